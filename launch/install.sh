#!/usr/bin/env bash
# Installs the project into .venv with the extras given: launch/install.sh demo,test
# Run again, it does nothing unless what is to be installed has changed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-demo}
for extra in ${extras//,/ }; do
    case $extra in
        demo | docs | test) ;;
        *)
            echo "install.sh: found the extra '$extra', allowed are demo, docs and test" >&2
            exit 2
            ;;
    esac
done

venv=$root/.venv
stamp=$venv/installed-$extras
# The folder counts too: an editable installation does not survive being copied elsewhere.
wanted=$({ cat "$root"/{setup.py,pyproject.toml,launch/constraints.txt} && echo "$root"; } | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

usable() { # python, module: new enough, and has the module
    "$1" -c "import sys, $2; sys.exit(sys.version_info < (3, 11))" 2>/dev/null
}
if [ ! -e "$venv" ]; then
    for python in python3.11 python3.12 python3.13 python3 ""; do
        if usable "$python" "ensurepip, venv"; then break; fi
    done
    if [ -z "$python" ]; then
        found=$(python3 --version 2>/dev/null || echo "no python3")
        echo "install.sh: found $found, allowed is Python 3.11 or" \
            "newer with its venv module (Debian: apt install python3-venv)" >&2
        exit 2
    fi
    "$python" -m venv "$venv"
elif ! usable "$venv/bin/python" pip; then
    echo "install.sh: $venv lacks pip or Python 3.11 or newer; delete it and retry" >&2
    exit 2
fi
echo "installing into ${venv#"$PWD/"} (takes a minute or two)" >&2
log=$venv/install.log
if ! "$venv/bin/python" -m pip install -c "$root/launch/constraints.txt" -e "$root[$extras]" \
    >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "install.sh: pip failed; its whole output is in $log" >&2
    exit 1
fi
echo "$wanted" >"$stamp"
