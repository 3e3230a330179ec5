#!/usr/bin/env bash
# Run on a machine with one or more GPUs every path that no GPU has run yet, on the demo model, and
# print a table of passed and failed with times; then host waits, bytes sent, the parts of the init,
# and a pass against the frozen base's and PEFT's. Writes all of it to gpu_check.json. Under ten
# minutes. Without a GPU: says so, exits 0. Options go to gpu_check.py (--out, --on-cpu).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
exec python scripts/gpu_check.py "$@"
