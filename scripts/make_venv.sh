#!/bin/sh
# Make .venv if it is missing, and install llamagym into it with the extras given: scripts/make_venv.sh warmstart,notebook
# PYTHON=/path/to/python chooses the interpreter; otherwise the first of the usual names that works.
set -eu
cd "$(dirname "$0")/.."

# Some machines have commands of these names that fail when run, or a Python without venv: so each is tried.
fits() {
    "$1" -c 'import sys, venv, ensurepip; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    found=
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if fits "$candidate"; then found=$candidate; break; fi
    done
    if [ -z "$found" ]; then
        echo "llamagym needs Python 3.11, 3.12 or 3.13 with the venv module; tried: ${PYTHON:-python3.11 python3.12 python3.13 python3 python}." >&2
        echo "Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2
        exit 1
    fi
    echo "Making .venv with $("$found" --version)"
    "$found" -m venv --clear .venv
fi

echo "Installing llamagym[$1] into .venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]"
