#!/usr/bin/env bash
# Makes .venv where it is missing, installs spray into it, and runs `spray` with the given options.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_spray "$root"
exec "$root/.venv/bin/spray" "$@"
