# Sourced by the other scripts: makes .venv if it is missing or out of date, and puts it first on PATH.
#
#   SPARSEFLOW_PYTHON   which Python (3.11 or 3.12); default: the first of python3.11, python3.12, python3 that fits
#   SPARSEFLOW_TORCH    what to give pip to get torch; default: torch==2.13.0
#   SPARSEFLOW_VENV     where; default: .venv in the repository

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SPARSEFLOW_VENV:-$root/.venv}
torch=${SPARSEFLOW_TORCH:-torch==2.13.0}

find_python() {
    local candidate
    for candidate in ${SPARSEFLOW_PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "SparseFlow needs Python 3.11 or 3.12; install one, or name it in SPARSEFLOW_PYTHON" >&2
    return 1
}

wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" <(echo "$root $torch") | sha256sum)
if [ "$(cat "$venv/.sparseflow" 2>/dev/null)" != "$wanted" ]; then
    python=$(find_python)
    echo "Making $venv (a few minutes the first time) ..." >&2
    "$python" -m venv "$venv"
    # torch before all else: asked for by another package, it would come with gigabytes for GPUs.
    # shellcheck disable=SC2086  # several words are meant to be several arguments
    "$venv/bin/pip" install --quiet --disable-pip-version-check $torch
    "$venv/bin/pip" install --quiet --disable-pip-version-check \
        -c <(grep -v '^torch==' "$root/constraints.txt") -e "$root[test,dev]"
    echo "$wanted" >"$venv/.sparseflow"
fi
export PATH=$venv/bin:$PATH
