#!/usr/bin/env bash
# Makes .venv where it is missing, installs spray with its test extra, and runs all tests, on up to four cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_spray "$root[test]"
cd "$root"
# One core for each of the processes that run tests at once.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
