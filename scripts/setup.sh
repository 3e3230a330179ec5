#!/usr/bin/env bash
# Set up everything in .venv: the versions of constraints.txt, this project, and the demo model.
# Idempotent: a second call takes a second. PYTHON names another interpreter (3.10 to 3.13).
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

PYTHON=${PYTHON:-python3}
command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON. Install Python 3.10 to 3.13, or name one: PYTHON=python3.12 $0"
"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
  fail "$("$PYTHON" --version) is not supported; Python 3.10 to 3.13 is. Name one: PYTHON=python3.12 $0"
command -v g++ >/dev/null ||
  fail "there is no C++ compiler, which DeepSpeed needs to build its operators. Debian: apt-get install g++; conda: conda install gxx"

if ! [ -x .venv/bin/python ]; then
  "$PYTHON" -m venv .venv || fail "python's venv module does not work. Debian: apt-get install python3-venv"
fi

# The stamp holds what was installed: nothing is done when it fits.
wanted=$(cat constraints.txt pyproject.toml scripts/setup.sh | sha256sum)
if [ "$(cat .venv/setup.stamp 2>/dev/null)" != "$wanted" ]; then
  pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
  # torch first: DeepSpeed's build imports it.
  pip install -q -c constraints.txt torch numpy setuptools wheel ninja
  pip install -q -c constraints.txt --no-build-isolation -e '.[demo,dev]'
  printf '%s' "$wanted" >.venv/setup.stamp
fi
.venv/bin/ninja --version >/dev/null 2>&1 ||
  fail "ninja in .venv does not run, which DeepSpeed needs to build its operators: .venv/bin/python -m pip install --force-reinstall ninja"

.venv/bin/python scripts/fetch_demo.py
echo "setup: done. Activate the environment: source .venv/bin/activate"
