#!/usr/bin/env bash
# Time and memory of ways to train a ViT-B, L and g in bf16 on one GPU, in ten minutes at most, as one
# table: benchmarks/gpu.sh [--smoke] [benchmarks/gpu.py's arguments]
# Installs nothing: takes .venv's Python if there is one, else python3, with setup.py's requirements.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" benchmarks/gpu.py "$@"
