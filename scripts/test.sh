#!/usr/bin/env bash
# Set up, then lint, types, import contracts and tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# The tests on several hosts need root; without it they skip, and nothing is installed for them.
if [ "$(id -u)" = 0 ] && [ -e /etc/debian_version ]; then scripts/setup.sh --nodes; else scripts/setup.sh; fi
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
codespell
mypy
lint-imports
pytest "$@"
