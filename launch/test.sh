#!/usr/bin/env bash
# Installs what the tests need and runs them: launch/test.sh [--all] [pytest's arguments]
# On a machine with a GPU, launch/test.sh --gpu [pytest's arguments] runs the tests marked gpu, within
# ten minutes. It installs nothing: takes .venv's Python if there is one, else python3.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
if [ "${1:-}" = --gpu ]; then
    shift
    python=python3
    if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    if ! "$python" -c "import torch, pytest, sys; sys.exit(not torch.cuda.is_available())" \
        2>/dev/null; then
        echo "test.sh: --gpu needs a GPU that torch can use, and pytest: found none with" \
            "$(command -v "$python")" >&2
        exit 2
    fi
    exec "$python" -m pytest --gpu "$@"
fi
select=(-m "not slow")
if [ "${1:-}" = --all ]; then
    select=()
    shift
fi
"$root/launch/install.sh" test
export PATH="$root/.venv/bin:$PATH"
# Ranks share the cores: more threads than cores would slow every test with several of them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ruff check .
ruff format --check .
mypy dr2dist
# Many tests wait for processes that they start, so three files run at a time. A file's tests stay
# together, for they share its runs and its worker's pools of ranks. tests/conftest.py orders the files.
exec python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "${select[@]}" "$@"
