#!/usr/bin/env bash
# Installs what the tests need and runs them: launch/test.sh [--all] [pytest's arguments]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
select=(-m "not slow")
if [ "${1:-}" = --all ]; then
    select=()
    shift
fi
"$root/launch/install.sh" test
cd "$root"
export PATH="$root/.venv/bin:$PATH"
# Ranks share the cores: more threads than cores would slow every test with several of them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ruff check .
ruff format --check .
mypy dr2dist
exec python -m pytest "${select[@]}" "$@"
