#!/usr/bin/env bash
# The API reference from docstrings, into build/docs or the folder given: open index.html there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
out=${1:-$root/build/docs}
python "$root/scripts/reference.py" "$out"
echo "$out/index.html"
