#!/usr/bin/env bash
# LoRA-SB's arithmetic experiment (arXiv 2411.19557, Table 1): 50,000 rows of MetaMathQA, then
# GSM8K and MATH.
#
#   scripts/recipes/arithmetic.sh --model mistral-7b --r 96 --machine 80gb
#
#   --model NAME     mistral-7b (default) or gemma-2-9b
#   --r N            rank: the paper has 32, 64 and 96 (default 96)
#   --machine NAME   24gb, 80gb (default) or 8x80gb: how the base is held, rows at a time
#   --gpus N         such GPUs (default 1; 8x80gb has 8)
#   --out DIR        default runs/recipes/arithmetic-MODEL-rN
#   --plan           what `lorasb plan` says of 1 x 24, 1 x 80 and 8 x 80 GB, and nothing else
#   --dry-run        print the commands only
#   --smoke          the same commands on the demo model and rows made up here, on the CPU
#
# docs/recipes.md says where every number comes from, and what differs from the paper.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"

fit() { # fit MACHINE: how the base is held there, by `lorasb plan`
  case $MODEL-$1 in
    mistral-7b-24gb) FIT=(--load-in-4bit --micro-batch-size 4 --init-memory-gib 8) ;;
    gemma-2-9b-24gb) FIT=(--load-in-4bit --micro-batch-size 2 --init-memory-gib 8) ;;
    *) FIT=(--micro-batch-size 4) ;;
  esac
}

parse_options "$@"
choose mistral-7b gemma-2-9b
[[ -z $DATA_DIR ]] || refuse "--data-dir is for commonsense.sh: these sets come from the hub. Leave it out."
declare -A HUB=([mistral-7b]=mistralai/Mistral-7B-v0.1 [gemma-2-9b]=google/gemma-2-9b [demo]=demo)
BASE=${HUB[$MODEL]}

ROWS='meta-math/MetaMathQA@train[:50000]' # section 3.1: 50k rows; which was not found
GSM8K=openai/gsm8k:main@test
MATH=HuggingFaceH4/MATH-500@test # 500 of MATH's 5000 test rows
EVAL=()
TRAIN=(
  --epochs 1                  # Table 8
  --train-batch-size 32       # Table 8: 1 row x 32 accumulation steps
  --max-length 512            # Table 8
  --optimizer adamw           # Table 8
  --lr 1e-4                   # Table 8
  --lr-scheduler cosine       # Table 8
  --warmup-ratio 0.02         # Table 8
  --weight-decay 0            # not in Table 8: the default here
  --max-grad-norm 1           # not in Table 8: the default here
  --target-modules all-linear # section 3: attention and fully connected layers
  --init-samples 57           # 1/1000 of the rows, 50; 7 more are held back to choose eta
  --seed 42                   # not found: the default here
)
if $SMOKE; then # later options win over earlier ones
  stand_in arithmetic
  ROWS=$SCRATCH/metamath.json GSM8K=$SCRATCH/gsm8k.jsonl MATH=$SCRATCH/math.jsonl
  R=${R:-4}
  TRAIN+=(--train-batch-size 4 --init-samples 4 --max-steps 2 --lr 2e-3 --target-modules q_proj)
  TRAIN+=(--dtype "$DTYPE")
  EVAL=(--dtype "$DTYPE" --num-samples 4 --max-new-tokens 8)
fi
R=${R:-96}
TRAIN=(--data "$ROWS" "${TRAIN[@]}")
OUT=${OUT:-runs/recipes/arithmetic-$MODEL-r$R}
quantization_of "${FIT[@]}"

if $PLAN; then
  plan_all
  exit
fi

section "plan"
if $SMOKE; then run lorasb plan --model demo --num-procs 1 --r "$R"; else plan_machine "$MACHINE" "$GPUS"; fi

section "before"
evaluate before "$GSM8K" "$MATH" # their tasks are told by their rows

train

section "after"
evaluate after "$GSM8K" "$MATH"

finish gsm8k math
