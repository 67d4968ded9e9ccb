#!/usr/bin/env bash
# Checks on a GPU: bash scripts/gpu_check.sh [--part tests|sanitizer|bench] [--out FOLDER] [--quick] [--stores FOLDER]
#                                            [--total-s SECONDS]
#   tests      tests/gpu, and the kernels' tests on the GPU; four minutes or so
#   sanitizer  compute-sanitizer's memcheck and racecheck over the kernels' tests; both at once, eight minutes at most
#   bench      scripts/bench/gpu.py; --quick: two cases, a minute and a half; --total-s: of all, default 300
# Default: all three, in this order. Each writes FOLDER/PART.json (default: gpu-check) beside its logs. The exit code is
# 0 only if all is right.
#
# Runs this checkout, whether it is installed or not: PYTHON (default: python3) needs a torch that sees the GPU, and what
# pyproject.toml asks for; the tests pytest, hypothesis and filelock, the benchmark accelerate.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
parts=(tests sanitizer bench)
out=gpu-check
bench_words=()
quietly=(-q -p no:cacheprovider -p no:benchmark) # what else is installed may warn, which would fail

refuse() {
    echo "gpu_check: $1" >&2
    exit "${2:-1}"
}

while [ $# -gt 0 ]; do
    case $1 in
    --part | --out | --stores | --total-s)
        [ $# -gt 1 ] || refuse "$1 takes a value" 2
        ;;&
    --part)
        case $2 in tests | sanitizer | bench) parts=("$2") ;; *) refuse "--part $2: tests, sanitizer or bench" 2 ;; esac
        shift 2
        ;;
    --out) out=$2 && shift 2 ;;
    --stores | --total-s) bench_words+=("$1" "$2") && shift 2 ;;
    --quick) bench_words+=("$1") && shift ;;
    *) refuse "$1 is not known; it takes --part, --out, --quick, --stores and --total-s" 2 ;;
    esac
done

export PYTHONPATH=$root:$root/daemon${PYTHONPATH:+:$PYTHONPATH}
if ! seen=$("$python" -c 'import torch; print(torch.cuda.is_available(), torch.__version__)' 2>/dev/null); then
    refuse "$python has no torch; name one that has in PYTHON"
fi
[ "${seen%% *}" = True ] || refuse "torch ${seen#* } sees no GPU here"
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root"

step() { # PART NAME SECONDS COMMAND...: a step with a limit of time; its output goes to a file
    local part=$1 name=$2 limit=$3 began=$SECONDS code=0
    shift 3
    rm -f "$out/$name".*
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - began)) >>"$out/$part.steps"
}

sum_up() { # PART
    "$python" -m sparseflow.bench.gpu.outcome "$1" "$out"
}

tests() {
    rm -f "$out/tests.steps"
    step tests kernels-on-gpu 240 "$python" -m pytest "${quietly[@]}" -n 4 \
        --junitxml="$out/kernels-on-gpu.xml" tests/kernels/device
    step tests gpu 330 "$python" -m pytest "${quietly[@]}" -n 0 -m gpu \
        --junitxml="$out/gpu.xml" tests/gpu
    sum_up tests
}

sanitizer() {
    local tool=${COMPUTE_SANITIZER:-compute-sanitizer} name waiting=()
    command -v "$tool" >/dev/null || tool=/usr/local/cuda/bin/compute-sanitizer
    command -v "$tool" >/dev/null ||
        refuse "compute-sanitizer is not found; it comes with CUDA's toolkit: name it in COMPUTE_SANITIZER"
    rm -f "$out/sanitizer.steps"
    # Each tensor has an allocation of its own, or a kernel could write beside it unseen. Tests of many random steps
    # launch the same kernels again and again: left out.
    for name in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step sanitizer "$name" 480 "$tool" --tool "$name" --target-processes all \
            --error-exitcode 86 --log-file "$out/$name.sanitizer.txt" \
            "$python" -m pytest "${quietly[@]}" -n 0 --junitxml="$out/$name.xml" \
            -k "not long_runs and not as_a_list_would_be_kept" tests/kernels/device &
        waiting+=($!)
    done
    wait "${waiting[@]}"
    sum_up sanitizer
}

bench() {
    timeout --kill-after=20 590 "$python" scripts/bench/gpu.py --out "$out/bench.json" ${bench_words[@]+"${bench_words[@]}"}
}

failed=()
for part in "${parts[@]}"; do
    "$part" || failed+=("$part")
done
[ ${#failed[@]} = 0 ] || refuse "not right: ${failed[*]}; see $out"
echo "gpu_check: ${parts[*]}: all is right; $out"
