#!/usr/bin/env bash
# docs/results.md: LoRA-SB at four ranks and re-based, LoRA at two, LoRA-XS, LoRA-One and LoRA-GA, on GSM-Symbolic and on
# lists of words; several learning rates each, three seeds for each best; and runs that are watched as they train.
# The same command goes on where it was stopped.
#   scripts/results.sh [FOLDER]     default: runs/results
# RESULTS_STEPS, RESULTS_ROWS, RESULTS_ANSWERS, RESULTS_SEEDS, RESULTS_PARALLEL: other sizes, for a trial.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONHASHSEED=0
FOLDER=${1:-runs/results}
STEPS=${RESULTS_STEPS:-24} ROWS=${RESULTS_ROWS:-40} ANSWERS=${RESULTS_ANSWERS:-64} SEEDS=${RESULTS_SEEDS:-42,43,44}
PARALLEL=${RESULTS_PARALLEL:-2}
SECONDS=0

mkdir -p "$FOLDER"
[ -s "$FOLDER/data/test.jsonl" ] || python scripts/results/data.py "$FOLDER/data"
head -n "$ROWS" "$FOLDER/data/test.jsonl" >"$FOLDER/data/held-out.jsonl"

GSM=(
  --model demo --data "$FOLDER/data/train.jsonl" --eval-data "$FOLDER/data/held-out.jsonl"
  --micro-batch-size 4 --init-micro-batch-size 8 --max-length 256 --init-samples 32 --max-steps "$STEPS" --num-procs 1
)
REBASED=(--method rebased=lora-sb --for rebased:rebase_every=$((STEPS / 3)))

# Learning rates around the best ones of shorter trials.
lorasb compare --output-dir "$FOLDER/gsm" "${GSM[@]}" --seed "$SEEDS" --best 10 --parallel "$PARALLEL" \
  "${REBASED[@]}" --r rebased=32 --lr rebased=2e-3,4e-3,8e-3 \
  --method lora-sb --r lora-sb=32,64,96,128 --lr lora-sb-r32=1.5e-3,3e-3,6e-3 \
  --lr lora-sb-r64=7e-4,1.5e-3,3e-3 --lr lora-sb-r96=5e-4,1e-3,2e-3 --lr lora-sb-r128=4e-4,8e-4,1.6e-3 \
  --method lora --r lora=6,32 --lr lora-r6=1e-3,3e-3,9e-3 --lr lora-r32=1e-3,3e-3,9e-3 \
  --method lora-xs --r lora-xs=96 --lr lora-xs=1e-4,3e-4,1e-3 \
  --method lora-one --r lora-one=32 --lr lora-one=3e-4,1e-3,3e-3 \
  --method lora-ga --r lora-ga=32 --lr lora-ga=2.5e-5,1e-4,4e-4

# Lists of words to reverse, at which a model of 135M is right or wrong; learning rates around the best ones above.
lorasb compare --output-dir "$FOLDER/words" --model demo --micro-batch-size 8 --init-samples 32 --max-steps "$STEPS" \
  --num-procs 1 --seed "$SEEDS" --best 4 --parallel "$PARALLEL" \
  --eval-samples "$ANSWERS" --max-new-tokens 32 --eval-batch-size 32 \
  "${REBASED[@]}" --r rebased=32 --lr rebased=2e-3,4e-3 \
  --method lora-sb --r lora-sb=96 --lr lora-sb=1e-3,2e-3 \
  --method lora --r lora=32 --lr lora=1e-3,3e-3 \
  --method lora-xs --r lora-xs=96 --lr lora-xs=3e-4,1e-3

# How soon a loss is reached, what as many steps as two re-basings take time for would do, and how the gradient leaves
# the basis: runs that are watched.
watched() { # watched NAME OPTIONS…
  OMP_NUM_THREADS=1 lorasb train --resume auto --output-dir "$FOLDER/watched/$1" "${GSM[@]}" --eval-every $((STEPS / 6)) \
    --save-every 1000 --seed 42 "${@:2}"
}
BEST=(--r 96 --lr 1e-3)
LORA=(--method lora --r 32 --lr 3e-3)
LONGER=(--max-steps $((2 * STEPS)))
watched rebased --r 32 --lr 4e-3 --rebase-every $((STEPS / 3)) --track-alignment $((STEPS / 6)) &
watched lora-sb "${BEST[@]}" --track-alignment $((STEPS / 6))
wait $!
watched lora-longer "${LORA[@]}" "${LONGER[@]}" &
watched lora-sb-longer "${BEST[@]}" "${LONGER[@]}"
wait $!
watched lora "${LORA[@]}"
python scripts/results/tokens_to_loss.py --output "$FOLDER/watched.json" \
  "$FOLDER"/watched/{rebased,lora-sb,lora-sb-longer,lora-longer,lora}
echo "results: $FOLDER/gsm/compare.md and $FOLDER/words/compare.md with their pictures, $FOLDER/watched; $SECONDS s"
