#!/usr/bin/env bash
# Writes the reference pages to outputs/docs, or to the folder that is given.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_spray "$root[docs]"
exec "$root/.venv/bin/python" "$root/scripts/docs.py" "${1:-$root/outputs/docs}"
