#!/usr/bin/env bash
# Set up, then lint, types, import contracts and tests: those that CI runs.
#   scripts/test.sh --fast   unit tests only, a second each
#   scripts/test.sh --all    also the slow ones; at the end it lists what was skipped, and why
# Further arguments go to pytest: scripts/test.sh tests/unit, scripts/test.sh --all -k resume
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1-} in
  --fast) tier=(-m fast) && shift ;;
  --all) tier=(-m "" --hypothesis-profile all) && shift ;;
  *) tier=(-m "not slow") ;;
esac

# The tests on several hosts need root; without it they skip, and nothing is installed for them.
if [ "$(id -u)" = 0 ] && [ -e /etc/debian_version ]; then
  scripts/setup.sh --dev --nodes
else
  scripts/setup.sh --dev
fi
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
codespell
mypy
lint-imports
# Two modules at a time (tests/conftest.py), in order: the long ones come first.
pytest -n 2 --dist loadscope --no-loadscope-reorder --durations=25 "${tier[@]}" "$@"
