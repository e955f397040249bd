#!/usr/bin/env bash
# From nothing to a finetuned reversible backbone: installs, fetches weights and images, makes
# shards, runs two short finetunings on two ranks and prints what they reached.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
launch/install.sh demo
export PATH="$root/.venv/bin:$PATH"
# Without a GPU DeepSpeed would say at every start that it has found none.
if ! nvidia-smi >/dev/null 2>&1; then export DS_ACCELERATOR=cpu; fi

python launch/fetch_demo.py --output demo
if [ ! -d demo/elpv ]; then
    dr2dist shards make --from elpv --source demo/elpv-source --output demo/elpv \
        --val-fraction 0.23
fi

run() { # config, name
    rm -rf "runs/quickstart/$2"
    deepspeed --quiet --num_accelerators 2 launch/train.py --config "$1" \
        train.epochs=null train.steps=50 output="runs/quickstart/$2"
}
echo "== exact reversal at alpha 0.9, beta 0.1"
run configs/elpv_vit_small.yaml exact
echo "== conventional finetuning, the same steps"
run configs/elpv_vit_small_conventional.yaml conventional

echo "== memory of a step of the same model at the same coefficients, in one process"
rm -rf runs/quickstart/memory
dr2dist bench --model vit_small_patch14_dinov2 --size 112 --measure memory batch \
    --cases conventional exact "exact sliced" --batches 4 12 --limit 1GiB \
    --output runs/quickstart/memory >runs/quickstart/memory.log 2>&1 ||
    { cat runs/quickstart/memory.log >&2; exit 1; }
grep "^|" runs/quickstart/memory/results.md

echo "== the two runs"
dr2dist report runs/quickstart/exact runs/quickstart/conventional
