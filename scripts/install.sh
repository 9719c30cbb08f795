# Sourced by run.sh and test.sh: defines `root`, the checkout, and `install_spray REQUIREMENT`.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Installs once, and again when pyproject.toml has changed since.
install_spray() {
    local requirement="$1" stamp
    stamp="$root/.venv/.installed${requirement#"$root"}-$(cksum < "$root/pyproject.toml" | tr ' ' '-')"
    [[ -e "$stamp" ]] && return
    if [[ ! -x "$root/.venv/bin/pip" ]]; then
        "$(find_python)" -m venv "$root/.venv"
    fi
    echo "installing spray into $root/.venv (takes minutes the first time)" >&2
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$requirement" >&2
    touch "$stamp"
}

# Prints the first Python that spray supports.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "spray: error: needs Python 3.11, 3.12 or 3.13 with venv; install one of them" >&2
    return 2
}
