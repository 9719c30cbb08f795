#!/usr/bin/env bash
# Makes .venv where it is missing, installs spray with its test extra, and runs all tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_spray "$root[test]"
cd "$root"
exec .venv/bin/python -m pytest "$@"
