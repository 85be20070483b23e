#!/bin/bash
# All that waits for an NVIDIA GPU: the tests, and the figures of docs/speed.md. Perhaps 20 minutes on an H200.
#
#     pip install -e ".[gpu,bench,test]"
#     bash benchmarks/gpu.sh
#     TINY=1 bash benchmarks/gpu.sh    tries every command with small networks, on any machine; keeps no figures
#
# Goals, printed beside the figures: MFU (causal) of 35 % for S, 47 % for M and 50 % for L, and no slower than the twin
# in PyTorch; 90, 30 and 15 images/s in sampling.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
out=benchmarks/results training=() sampling=() data=() tests=() failed=()
if [ -n "${TINY:-}" ]; then
    out=$(mktemp -d) training=(--tiny --cases iGPT-S) sampling=(--tiny --sizes s)
    data=(--repeats=1 --rounds=1) tests=(tests/test_attention.py tests/test_gpu.py --collect-only)
fi

if [ "${memory:-0}" -lt 120000 ]; then # MiB: training holds two networks at once, which take 110 GiB for L
    training+=(--apart)
fi

try() { # goes on after a command that fails, and names it at the end
    echo "== $*"
    "$@" || failed+=("$*")
}

try python -m pytest -q -n 0 -m gpu "${tests[@]}"
try python benchmarks/training.py --device=gpu "${training[@]}" --out="$out/training_gpu.json"
try python benchmarks/sampling_gpu.py "${sampling[@]}" --out="$out/sampling_gpu.json"
try python benchmarks/data.py "${data[@]}" --out="$out/data_gpu.json"
if [ -z "${TINY:-}" ]; then
    try python benchmarks/speed_page.py
fi
for command in "${failed[@]}"; do
    echo "failed: $command"
done
[ ${#failed[@]} -eq 0 ]
