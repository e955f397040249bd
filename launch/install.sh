#!/usr/bin/env bash
# Installs the project into .venv with the extras given: launch/install.sh demo,test
# Run again, it does nothing unless what is to be installed has changed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-demo}
venv=$root/.venv
stamp=$venv/installed-$extras
wanted=$(cat "$root/setup.py" "$root/launch/constraints.txt" | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
python=$(command -v python3.11 || command -v python3 || true)
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "dr2dist needs Python 3.11 or newer with its venv module" >&2
    exit 2
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "installing into $venv (takes a minute or two)" >&2
log=$venv/install.log
if ! "$venv/bin/python" -m pip install -c "$root/launch/constraints.txt" -e "$root[$extras]" \
    >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "installing failed; the whole log is $log" >&2
    exit 1
fi
echo "$wanted" >"$stamp"
