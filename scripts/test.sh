#!/usr/bin/env bash
# Set up, then lint, types, import contracts and tests: those that CI runs.
#   scripts/test.sh --fast   unit tests only, a second each
#   scripts/test.sh --all    also the slow ones; at the end it lists what was skipped, and why
# Further arguments go to pytest: scripts/test.sh tests/unit, scripts/test.sh --all -k resume
set -euo pipefail
cd "$(dirname "$0")/.."
profile=(--hypothesis-profile quick) others="not fast and not slow"
case ${1-} in
  --fast) others= && shift ;;
  --all) profile=(--hypothesis-profile all) others="not fast" && shift ;;
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
# pytest ends with 5 where the further arguments leave it no test.
tests() { pytest --durations=25 "${profile[@]}" "$@" || [ $? = 5 ]; }
# Unit tests are one process each: two modules at a time. The others start ranks, which want both cores.
tests -n 2 --dist loadfile -m fast "$@"
[ -z "$others" ] || tests -m "$others" "$@"
