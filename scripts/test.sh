#!/usr/bin/env bash
# Set up, then lint, types, import contracts and tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
codespell
mypy
lint-imports
pytest "$@"
