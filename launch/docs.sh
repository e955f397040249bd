#!/usr/bin/env bash
# Installs what the site of docs/ needs and builds it into build/docs. A broken link, a page that is
# not in the navigation or a name of docs/api.md that the code does not have fails.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/install.sh" docs
# Warnings fail, and --quiet would not count them.
"$root/.venv/bin/mkdocs" build --strict --config-file "$root/mkdocs.yml"
echo "the pages begin at $root/build/docs/index.html"
