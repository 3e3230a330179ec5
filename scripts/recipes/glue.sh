#!/usr/bin/env bash
# LoRA-SB's experiment of language understanding (arXiv 2411.19557): RoBERTa on tasks of GLUE, each
# trained and evaluated by itself.
#
#   scripts/recipes/glue.sh --task cola --task rte --machine 24gb
#
#   --task NAME      cola, rte, mrpc, stsb, sst2, qnli, qqp or mnli; may be given several times
#                    (default all)
#   --model NAME     roberta-large (default) or roberta-base
#   --r N            rank (default 24)
#   --machine NAME   24gb, 80gb (default) or 8x80gb: rows at a time
#   --gpus N         such GPUs (default 1; 8x80gb has 8)
#   --data-dir DIR   a folder with TASK/train.jsonl and TASK/validation.jsonl (default: from the hub)
#   --out DIR        default runs/recipes/glue-MODEL-rN
#   --dry-run        print the commands only
#   --smoke          the same commands on a tiny random RoBERTa and rows made up here, on the CPU
#
# docs/recipes.md says where every number comes from, and what differs from the paper.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"

fit() { # fit MACHINE: rows at a time; by hand, since `lorasb plan` knows no encoders
  case $1 in
    24gb) FIT=(--micro-batch-size 32) ;;
    80gb) FIT=(--micro-batch-size 128) ;;
    8x80gb) FIT=(--micro-batch-size 16) ;;
  esac
}

ALL=(cola rte mrpc stsb sst2 qnli qqp mnli)
TASKS=() OTHERS=()
while (($#)); do
  if [[ $1 == --task ]]; then
    (($# > 1)) || refuse "--task needs a value. --help lists the options."
    [[ " ${ALL[*]} " == *" $2 "* ]] || refuse "--task $2 is unknown. Known: ${ALL[*]}."
    TASKS+=("$2") && shift 2
  else
    OTHERS+=("$1") && shift
  fi
done
parse_options "${OTHERS[@]}"
choose roberta-large roberta-base
if $PLAN; then refuse "--plan: lorasb plan knows no encoders. A run plans its memory before it begins."; fi

COMMON=(
  --task-type sequence-classification
  --epochs 30              # the authors' train_glue.py, as all without a remark
  --train-batch-size 128
  --max-length 128
  --optimizer adamw
  --lr 1e-3
  --lr-scheduler linear
  --warmup-ratio 0.06
  --weight-decay 0.01      # of torch's AdamW, since it gives none
  --max-grad-norm 0
  --target-modules query,value,output.dense # of attention, and of the fully connected layers
  --init-lr schedule
  --seed 42
)
EVAL=(--batch-size 64)
if $SMOKE; then # later options win over earlier ones
  stand_in glue
  DATA_DIR=$SCRATCH R=${R:-4}
  ((${#TASKS[@]})) || TASKS=(cola mrpc stsb) # one of each kind
  COMMON+=(--train-batch-size 8 --init-samples 8 --max-steps 2 --dtype fp32)
  FIT=(--micro-batch-size 8)
fi
declare -A HUB=([roberta-large]=FacebookAI/roberta-large [roberta-base]=FacebookAI/roberta-base)
HUB[demo]=${SCRATCH:-}/tiny-roberta
BASE=${HUB[$MODEL]}
((${#TASKS[@]})) || TASKS=("${ALL[@]}")
R=${R:-24}
WHOLE=${OUT:-runs/recipes/glue-$MODEL-r$R}
quantization_of "${FIT[@]}"

rows() { # rows TASK train|validation: where they are
  local split=$2
  if [[ -n $DATA_DIR ]]; then
    echo "$DATA_DIR/$1/$split.jsonl"
    return
  fi
  if [[ $1-$split == mnli-validation ]]; then split=validation_matched; fi
  echo "nyu-mll/glue:$1@$split"
}

if [[ -n $DATA_DIR ]] && ! { $SMOKE && $DRY_RUN; }; then
  for task in "${TASKS[@]}"; do
    for split in train validation; do
      file=$(rows "$task" "$split")
      [[ -s $file ]] || refuse "$file is missing. Put the task's rows there, or leave out --data-dir."
    done
  done
fi

for task in "${TASKS[@]}"; do
  section "$task"
  OUT=$WHOLE/$task
  TRAIN=(--data "$(rows "$task" train)" --eval-data "$(rows "$task" validation)" "${COMMON[@]}")
  train # with the scores of the base under a new head, of the init, and at the end
  section "$task, evaluated"
  evaluate after "$(rows "$task" validation)"
done

section "scores"
run python scripts/recipes/glue_scores.py "$WHOLE" "${TASKS[@]}"
