#!/usr/bin/env bash
# The tables of README.md and docs/memory.md: memory, time and limits of all ways to train a ViT-S.
# Takes about an hour on two cores; what is measured goes to runs/bench.
#   benchmarks/memory_engine.sh [memory|limits|resolution|depths|time ...]     default: all
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bench() {
    python -m dr2dist.cli bench --model vit_small_patch16_224 --output runs/bench "$@"
}
for part in "${@:-memory limits resolution depths time}"; do
    for name in $part; do
        case $name in
            memory) bench --measure memory --depths 24 48 ;;
            limits)
                bench --measure memory batch --depths 24 --cases conventional \
                    "checkpoint per block" "exact sliced" "exact 16 bits sliced"
                ;;
            resolution)
                bench --measure resolution --cases conventional "checkpoint per block" \
                    "exact sliced"
                ;;
            depths) bench --measure memory --depths 12 96 --cases "float sliced" "exact sliced" ;;
            time)
                bench --measure time --rounds 9 --depths 12 --cases conventional "checkpoint per block" \
                    "checkpoint per block, no early stop" exact "exact sliced" budget
                ;;
            *)
                echo "memory_engine.sh: found '$name', allowed are memory, limits, resolution," \
                    "depths, time" >&2
                exit 2
                ;;
        esac
    done
done
