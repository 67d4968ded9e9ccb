#!/usr/bin/env bash
# All checks: makes the environment, then lint, types and tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
unset PYTHONDONTWRITEBYTECODE # tests start hundreds of processes, and each would compile what it imports
ruff check .
ruff format --check .
mypy
exec pytest "$@"
