#!/usr/bin/env bash
# Set up, then lint, types, import contracts and tests: those that CI runs.
#   scripts/test.sh --fast   unit tests only, a second each
#   scripts/test.sh --all    also the slow ones; at the end it lists what was skipped, and why
# Further arguments go to pytest: scripts/test.sh tests/unit, scripts/test.sh --all -k resume
set -euo pipefail
cd "$(dirname "$0")/.."
profile=quick chosen="not slow"
case ${1-} in
  --fast) chosen=fast && shift ;;
  --all) profile=all chosen= && shift ;;
esac

# The tests on several hosts need root; without it they skip, and nothing is installed for them.
if [ "$(id -u)" = 0 ] && [ -e /etc/debian_version ]; then
  scripts/setup.sh --dev --nodes
else
  scripts/setup.sh --dev
fi
export PATH="$PWD/.venv/bin:$PATH"

compiling=
if [ "$chosen" != fast ]; then  # in the background: it and mypy take a core for a minute each
  DS_ACCELERATOR=cpu python -m tests.compile >.venv/compile.log 2>&1 &
  compiling=$!
fi
ruff check .
ruff format --check .
codespell
mypy
lint-imports
[ -z "$compiling" ] || wait "$compiling" || { cat .venv/compile.log && exit 1; }
# A worker takes a module at a time, in order: those that start ranks, which take longest, come first.
pytest --durations=25 --hypothesis-profile "$profile" -m "$chosen" \
  -n 2 --dist loadfile --no-loadscope-reorder "$@"
