#!/usr/bin/env bash
# All checks: makes the environment, then lint, types and tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
ruff check .
ruff format --check .
mypy
exec pytest "$@"
