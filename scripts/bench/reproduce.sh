#!/usr/bin/env bash
# Measures everything that the README's tables of speed show, and writes it to scripts/bench/results:
#   bash scripts/bench/reproduce.sh FOLDER [RESULT...]
# FOLDER takes checkpoints, stores and the peers' own models and environments, 45 GB if all are made; what is there
# already is used. RESULT: one of the functions below; default: all. Limits of memory need a cgroup (see README).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../environment.sh"
folder="$(mkdir -p "$1" && cd "$1" && pwd)"
shift
demo="$root/sparseflow/assets/demo_model"
results="$here/results"
mkdir -p "$results"
pip install --quiet --disable-pip-version-check -c <(grep -v "^torch==" "$root/constraints.txt") -e "$root[bench]"

model() {  # NAME: a checkpoint of a published shape, and its store
  [ -d "$folder/$1" ] || python "$root/scripts/make_synthetic_opt.py" --preset "$1" --out "$folder/$1" --text 8192
  [ -d "$folder/store-$1" ] || sparseflow convert "$folder/$1" "$folder/store-$1"
}

calibrated() {  # NAME: the same store, calibrated on random words
  model "$1"
  [ -d "$folder/calibrated-$1" ] && return
  sparseflow convert "$folder/$1" "$folder/calibrated-$1.partial"
  sparseflow calibrate "$folder/calibrated-$1.partial" --text "$folder/$1.txt" --tokens 2048 --epochs 0
  mv "$folder/calibrated-$1.partial" "$folder/calibrated-$1"
}

peer() {  # NAME PACKAGE...: an environment of its own, for what does not go together with ours
  [ -d "$folder/$1" ] && return
  python -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet "${SPARSEFLOW_TORCH:-torch==2.13.0}"
  "$folder/$1/bin/pip" install --quiet "${@:2}"
}

bench() {  # RESULT ARGUMENT...
  local result="$1"
  shift
  sparseflow bench "$@" --json --csv "$results/$result.csv" --plot "$results/$result" > "$folder/$result.json"
  rm "$results/$result.png"
  mv "$folder/$result.json" "$results/$result.json"
}

sparse=(sparseflow:fidelity=dense sparseflow sparseflow:fidelity=certified sparseflow:fidelity=calibrated)

opt-1.3b() {  # all of it in memory
  calibrated opt-1.3b
  bench opt-1.3b "$folder/opt-1.3b" --store "$folder/calibrated-opt-1.3b" --tokens 48 --rounds 3 \
    --cases transformers ctranslate2:compute=float32 ctranslate2:compute=int8 "${sparse[@]}" \
    --converted "ctranslate2=$folder/ctranslate2-opt-1.3b"
}

opt-1.3b-prompt() {  # time to the first token of a long prompt
  model opt-1.3b
  bench opt-1.3b-prompt "$folder/opt-1.3b" --store "$folder/store-opt-1.3b" --prompt-tokens 512 --tokens 8 --rounds 2 \
    --cases transformers ctranslate2:compute=int8 sparseflow:fidelity=dense sparseflow \
    --converted "ctranslate2=$folder/ctranslate2-opt-1.3b"
}

opt-1.3b-limited() {  # in 65 % of its size, and what Python and torch take
  calibrated opt-1.3b
  peer airllm airllm==4.0.0 'transformers>=5,<6' accelerate sentencepiece
  bench opt-1.3b-limited "$folder/opt-1.3b" --store "$folder/calibrated-opt-1.3b" --limit 2.15GiB \
    --tokens 32 --rounds 2 --cases device_map disk_offload partial_offload airllm:gc=stubbed \
    sparseflow:fidelity=dense sparseflow sparseflow:fidelity=calibrated \
    --python "airllm=$folder/airllm/bin/python" --converted "airllm=$folder/airllm-opt-1.3b"
}

opt-6.7b() {  # larger than the memory that it gets
  local store="$folder/store-opt-6.7b"
  [ -d "$store" ] || python "$root/scripts/make_synthetic_opt.py" --preset opt-6.7b --store --out "$store"
  calibrated opt-125m  # whose words go with any of these tokenizers
  [ -f "$store/profile.json" ] ||
    sparseflow calibrate "$store" --text "$folder/opt-125m.txt" --tokens 1024 --codes-only
  bench opt-6.7b "$store" --store "$store" --limit 9GiB --reserve 256MiB --tokens 24 --rounds 3 --deadline-s 1800 \
    --cases sparseflow sparseflow:fidelity=certified sparseflow:fidelity=calibrated
}

opt-125m() {
  calibrated opt-125m
  peer onnxruntime 'optimum-onnx[onnxruntime]==0.1.0' 'transformers<4.58'
  bench opt-125m "$folder/opt-125m" --store "$folder/calibrated-opt-125m" --tokens 64 --rounds 5 \
    --cases transformers ctranslate2:compute=float32 ctranslate2:compute=int8 onnxruntime "${sparse[@]}" \
    --python "onnxruntime=$folder/onnxruntime/bin/python" \
    --converted "ctranslate2=$folder/ctranslate2-opt-125m" "onnxruntime=$folder/onnxruntime-opt-125m"
}

demo() {
  [ -d "$folder/store-demo" ] || sparseflow convert "$demo" "$folder/store-demo"
  [ -f "$folder/store-demo/profile.json" ] ||
    sparseflow calibrate "$folder/store-demo" --text "$demo/calibration.txt"
  bench demo "$demo" --store "$folder/store-demo" --tokens 64 --rounds 5 \
    --cases transformers ctranslate2:compute=float32 "${sparse[@]}" \
    --converted "ctranslate2=$folder/ctranslate2-demo"
}

if [ $# = 0 ]; then
  set -- demo opt-125m opt-1.3b opt-1.3b-prompt opt-1.3b-limited opt-6.7b
fi
for result in "$@"; do
  "$result"
done
python "$here/tables.py" --write
