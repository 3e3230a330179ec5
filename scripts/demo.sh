#!/usr/bin/env bash
# The demo: set up, fine-tune SmolLM2-135M by LoRA-SB in two ZeRO-3 processes to reverse lists of
# words, and show loss and exact match on held-out rows before and after. Can be run again.
set -euo pipefail
cd "$(dirname "$0")/.."

RUN=runs/demo
STAGES=()
start=$SECONDS
stage() { # stage NAME COMMAND…: run it and note what it took
  local name=$1 began=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  "$@"
  STAGES+=("$(printf '%-12s %4d s' "$name" $((SECONDS - began)))")
}

stage set-up scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
mkdir -p runs
DTYPE=$(python scripts/cpu_dtype.py)

stage before lorasb eval --dtype "$DTYPE" --max-new-tokens 32 \
  --output-dir runs/demo-before --overwrite
stage training lorasb train --num-procs 2 --dtype "$DTYPE" --r 64 --micro-batch-size 8 --max-steps 32 \
  --output-dir "$RUN" --overwrite
stage after lorasb eval --adapter "$RUN/adapter" --dtype "$DTYPE" --max-new-tokens 32 \
  --output-dir runs/demo-after --overwrite

python scripts/demo_table.py "$RUN" runs/demo-before runs/demo-after
printf '%s\n' "${STAGES[@]}" "$(printf '%-12s %4d s' all $((SECONDS - start)))"
