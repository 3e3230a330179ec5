#!/usr/bin/env bash
# LoRA-SB's commonsense experiment (arXiv 2411.19557, Table 2): Commonsense-170k, then BoolQ, PIQA,
# SIQA, HellaSwag, WinoGrande, ARC easy and challenge, and OBQA.
#
#   git clone --depth 1 https://github.com/AGI-Edgerunners/LLM-Adapters
#   LLM_ADAPTERS=LLM-Adapters scripts/recipes/commonsense.sh --r 96 --machine 80gb
#
#   --model NAME     llama-3.2-3b (default)
#   --r N            rank: the paper has 32, 64 and 96 (default 96)
#   --machine NAME   24gb, 80gb (default) or 8x80gb: how the base is held, rows at a time
#   --gpus N         such GPUs (default 1; 8x80gb has 8)
#   --data-dir DIR   the clone (default: the variable LLM_ADAPTERS)
#   --out DIR        default runs/recipes/commonsense-MODEL-rN
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
    llama-3.2-3b-24gb) FIT=(--micro-batch-size 6 --init-memory-gib 8) ;;
    *) FIT=(--micro-batch-size 6) ;;
  esac
}

DATA_DIR=${LLM_ADAPTERS:+$(realpath -m -- "$LLM_ADAPTERS")}
parse_options "$@"
choose llama-3.2-3b
declare -A HUB=([llama-3.2-3b]=meta-llama/Llama-3.2-3B [demo]=demo)
BASE=${HUB[$MODEL]}

SETS=(boolq piqa social_i_qa hellaswag winogrande ARC-Easy ARC-Challenge openbookqa)
EVAL=(--task multiple-choice)
TRAIN=(
  --epochs 2                  # Table 8
  --train-batch-size 144      # Table 8: 6 rows x 24 accumulation steps
  --max-length 256            # Table 8
  --optimizer adamw           # Table 8
  --lr 2e-3                   # Table 8
  --lr-scheduler linear       # Table 8
  --warmup-ratio 0.02         # Table 8
  --weight-decay 0            # not in Table 8: the default here
  --max-grad-norm 1           # not in Table 8: the default here
  --target-modules all-linear # section 3: attention and fully connected layers
  --init-samples 194          # 1/1000 of the rows, 170; 24 more are held back to choose eta
  --seed 42                   # not found: the default here
)                             # Table 8 has dropout 0.05: there is none here
if $SMOKE; then # later options win over earlier ones
  stand_in commonsense
  DATA_DIR=$SCRATCH R=${R:-4}
  TRAIN+=(--train-batch-size 4 --init-samples 4 --max-steps 2 --target-modules q_proj)
  TRAIN+=(--dtype "$DTYPE")
  EVAL+=(--dtype "$DTYPE" --num-samples 4)
fi
R=${R:-96}
TRAIN=(--data "$DATA_DIR/ft-training_set/commonsense_170k.json" "${TRAIN[@]}")
OUT=${OUT:-runs/recipes/commonsense-$MODEL-r$R}
quantization_of "${FIT[@]}"

if $PLAN; then
  plan_all
  exit
fi

CLONE="git clone --depth 1 https://github.com/AGI-Edgerunners/LLM-Adapters"
[[ -n $DATA_DIR ]] || refuse "the data is missing. $CLONE, and name it by --data-dir or LLM_ADAPTERS."
if ! { $SMOKE && $DRY_RUN; }; then
  for file in ft-training_set/commonsense_170k.json "${SETS[@]/%//test.json}"; do
    [[ $file == */test.json ]] && file=dataset/$file
    [[ -s $DATA_DIR/$file ]] || refuse "$DATA_DIR/$file is missing. $CLONE, and name it by --data-dir."
  done
fi

section "plan"
if $SMOKE; then run lorasb plan --model demo --num-procs 1 --r "$R"; else plan_machine "$MACHINE" "$GPUS"; fi

TESTS=()
for set in "${SETS[@]}"; do TESTS+=("$DATA_DIR/dataset/$set/test.json"); done

section "before"
evaluate before "${TESTS[@]}"

train

section "after"
evaluate after "${TESTS[@]}"

finish "${SETS[@]}"
