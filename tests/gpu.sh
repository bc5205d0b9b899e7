#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than ten minutes: tests/gpu.sh FOLDER [PYTHON [DEVICE]]
# FOLDER gets the output of every part and the tables' JSON. A part that fails or takes too long is named and stops no
# other one; the exit code is 0 where all have passed.
set -uo pipefail
out=$(realpath -m "${1:?name a folder for the output}")
python=${2:-python}
device=${3:-cuda}
cd "$(dirname "$0")/.."
mkdir -p "$out"
failed=""

part() {  # NAME SECONDS COMMAND..
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>&1
    local code=$?
    tail -n 15 "$out/$name.txt"
    echo "== $name: exit code $code after $((SECONDS - start)) s (124: cut off at $limit s)"
    if [ $code -ne 0 ]; then failed="$failed $name"; fi
}

run=(--out_dir="$out/run" --cache_dir="$out/cache" --device="$device")
part device 15 "$python" -c "import machine, torch; print(machine.describe(torch.device('$device')))"
part train 100 "$python" train.py config/small.toml "${run[@]}" --max_iters=100 --warmup_iters=20 --final_eval_iters=10
part sample 30 "$python" sample.py --out_dir="$out/run" --device="$device" --prompt=def --max_new_tokens=200
part nccl 60 "$python" -m torch.distributed.run --standalone --nproc_per_node=1 train.py --parallel=fsdp --device="$device" \
    --out_dir="$out/fsdp" --cache_dir="$out/cache" --max_iters=30 --profile=3
part tests 160 "$python" -m pytest -q -m cuda -rs --durations=15 -k "not bench"
part length 80 "$python" bench.py length --device="$device" --only="attention 16384 bfloat16" --json="$out/length.json"
part bench 150 "$python" bench.py --device="$device" --json="$out/bench.json"

rm -rf "$out"/{run,fsdp}/*.pt "$out"/fsdp/shards-* "$out/cache"  # gigabytes
if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
echo "all parts passed; their output is in $out"
