#!/usr/bin/env bash
# The tables of README.md and docs/memory.md: memory, time and limits of all ways to train a ViT-S.
# Takes about two hours on two cores; what is measured goes to runs/bench.
#   benchmarks/memory_engine.sh [memory|limits|resolution|depths|bf16|time|wide ...]     default: all
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bench() {
    python -m dr2dist.cli bench --model vit_small_patch16_224 --output runs/bench --batches 16 32 \
        --time-batch 16 "$@"
}
checkpoints=("checkpoint per block" "checkpoint per block, no early stop")
sliced=("exact sliced" "exact 16 bits sliced")
for part in "${@:-memory limits resolution depths bf16 time wide}"; do
    for name in $part; do
        case $name in
            memory) bench --measure memory --depths 24 48 ;;
            limits)
                bench --measure memory batch --depths 24 --cases conventional \
                    "checkpoint per block" "${sliced[@]}"
                ;;
            resolution)
                bench --measure resolution --cases conventional "checkpoint per block" \
                    "exact sliced"
                ;;
            depths) bench --measure memory --depths 12 96 --cases "float sliced" "${sliced[@]}" ;;
            bf16)
                bench --bf16 --output runs/bench-bf16 --measure memory --depths 24 48 \
                    --cases "exact 16 bits sliced"
                ;;
            time)
                bench --measure time --rounds 7 --depths 12 --cases conventional \
                    "${checkpoints[@]}" exact "exact 16 bits" "${sliced[@]}" budget
                ;;
            wide)
                bench --model vit_base_patch16_224 --output runs/bench-wide --measure time \
                    --rounds 15 --depths 6 --time-batch 8 --cases "${checkpoints[@]}" exact \
                    "exact 16 bits"
                ;;
            *)
                echo "memory_engine.sh: found '$name', allowed are memory, limits, resolution," \
                    "depths, bf16, time, wide" >&2
                exit 2
                ;;
        esac
    done
done
