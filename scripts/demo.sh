#!/usr/bin/env bash
# From a fresh clone to text: makes the environment, converts the model in the repository, generates, compares.
# Arguments go to `sparseflow demo`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec sparseflow demo "$@"
