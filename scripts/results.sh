#!/usr/bin/env bash
# docs/results.md: five methods on GSM-Symbolic, three learning rates each, three seeds for the best two, and how the
# gradient's subspace ages. About an hour on two cores; the same command goes on where it was stopped.
#   scripts/results.sh [FOLDER]     default: runs/results
# RESULTS_STEPS, RESULTS_ROWS, RESULTS_ANSWERS: other sizes, for a trial.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONHASHSEED=0
FOLDER=${1:-runs/results}
STEPS=${RESULTS_STEPS:-24} ROWS=${RESULTS_ROWS:-48} ANSWERS=${RESULTS_ANSWERS:-48}

mkdir -p "$FOLDER"
[ -s "$FOLDER/data/test.jsonl" ] || python scripts/results/data.py "$FOLDER/data"
head -n "$ROWS" "$FOLDER/data/test.jsonl" >"$FOLDER/data/held-out.jsonl"

COMMON=(
  --model demo --data "$FOLDER/data/train.jsonl" --eval-data "$FOLDER/data/held-out.jsonl"
  --micro-batch-size 8 --max-length 512 --init-samples 40 --max-steps "$STEPS" --num-procs 1
)

# Per method the learning rates around the best one of shorter trials.
lorasb compare --output-dir "$FOLDER/compare" "${COMMON[@]}" \
  --method lora-sb --lr lora-sb=7e-4,2e-3,6e-3 \
  --method lora-xs --lr lora-xs=2.5e-4,1e-3,4e-3 \
  --method lora-one --lr lora-one=3e-4,1e-3,3e-3 \
  --method lora --lr lora=1e-3,3e-3,9e-3 \
  --method lora-ga --lr lora-ga=2.5e-5,1e-4,4e-4 \
  --r 32 --seed 42,43,44 --best 2 \
  --parallel 2 --eval-samples "$ANSWERS" --max-new-tokens 200 --eval-batch-size 24

# The same first run of LoRA-SB, watched.
lorasb train --resume auto --output-dir "$FOLDER/alignment" "${COMMON[@]}" \
  --method lora-sb --lr 2e-3 --r 32 --seed 42 --track-alignment 4 --save-every 1000
echo "results: $FOLDER/compare/compare.md and its pictures; $FOLDER/alignment/alignment.png"
