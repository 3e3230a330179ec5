# What the recipes share: options, and steps that are printed before they run. Sourced, not run.
# shellcheck shell=bash disable=SC2034  # DATA_DIR is for a recipe

MODEL="" R="" GPUS="" MACHINE="" OUT="" DATA_DIR=""
PLAN=false DRY_RUN=false SMOKE=false
MACHINES=(24gb 80gb 8x80gb)

refuse() { # what was asked for cannot be done
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

usage() { # the comment at the top of the recipe
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
}

parse_options() { # and go to the project's root; folders are meant from where one was
  while (($#)); do
    case $1 in
      --model | --r | --gpus | --machine | --out | --data-dir)
        (($# > 1)) || refuse "$1 needs a value. --help lists the options."
        case $1 in
          --model) MODEL=$2 ;;
          --r) R=$2 ;;
          --gpus) GPUS=$2 ;;
          --machine) MACHINE=$2 ;;
          --out) OUT=$(realpath -m -- "$2") ;;
          --data-dir) DATA_DIR=$(realpath -m -- "$2") ;;
        esac
        shift 2
        ;;
      --plan) PLAN=true && shift ;;
      --dry-run) DRY_RUN=true && shift ;;
      --smoke) SMOKE=true && shift ;;
      -h | --help) usage && exit ;;
      *) refuse "$1 is no option. --help lists them." ;;
    esac
  done
  local number
  for number in "${R:-1}" "${GPUS:-1}"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || refuse "--r and --gpus are whole numbers above 0, not $number."
  done
  [[ " ${MACHINES[*]} " == *" ${MACHINE:-80gb} "* ]] ||
    refuse "--machine $MACHINE is unknown. Known: ${MACHINES[*]}."
  if [[ $MACHINE == 8x80gb && ${GPUS:-8} != 8 ]]; then
    refuse "--machine 8x80gb has 8 GPUs, not $GPUS. Leave --gpus out, or name --machine 80gb."
  fi
  if $SMOKE && [[ -n $MACHINE$GPUS ]]; then
    refuse "--smoke runs in one process on the CPU. Leave out --machine and --gpus."
  fi
  if $SMOKE && $PLAN; then refuse "--plan is about GPUs, --smoke runs on the CPU. Name one of them."; fi
  cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
  export PATH="$PWD/.venv/bin:$PATH"
  command -v lorasb > /dev/null || refuse "lorasb is not there. scripts/setup.sh sets it up."
}

choose() { # choose DEFAULT-MODEL MODEL…: the model, and the machine that it runs on
  local known=("$@")
  if $SMOKE; then known=(demo); fi
  MODEL=${MODEL:-${known[0]}}
  [[ " ${known[*]} " == *" $MODEL "* ]] || refuse "--model $MODEL is unknown here. Known: ${known[*]}."
  MACHINE=${MACHINE:-80gb}
  if [[ $MACHINE == 8x80gb ]]; then GPUS=8; fi
  GPUS=${GPUS:-1}
  fit "$MACHINE"
  PROCESSES=(--num-gpus "$GPUS") EVAL_PROCESSES=()
  if ((GPUS > 1)); then EVAL_PROCESSES=("${PROCESSES[@]}" --ds-config ds_configs/zero2.json); fi
  if $SMOKE; then PROCESSES=(--num-procs 1); fi
}

run() { # run COMMAND…: print it so that it can be copied, then run it
  local line
  printf -v line '%q ' "$@"
  printf '\n$ %s\n' "${line% }"
  $DRY_RUN || "$@"
}

section() { printf '\n== %s\n' "$*"; }

plan() { # plan GPUS GIB: what fits there; R and TRAIN are the recipe's, FIT the machine's
  local options=() word i
  local words=("${TRAIN[@]}" "${FIT[@]}")
  for ((i = 0; i < ${#words[@]}; i++)); do
    word=${words[i]}
    case $word in
      --max-length | --init-samples | --micro-batch-size | --init-memory-gib)
        options+=("$word" "${words[i + 1]}")
        ;;
      --gradient-checkpointing) options+=("$word") ;;
    esac
  done
  run lorasb plan --model "$MODEL" --gpus-per-node "$1" --gpu-memory-gib "$2" --r "$R" "${options[@]}"
}

plan_machine() { # plan_machine MACHINE GPUS
  fit "$1"
  case $1 in
    24gb) plan "$2" 24 ;;
    80gb | 8x80gb) plan "$2" 80 ;;
  esac
}

plan_all() {
  section "1 x 24 GB"
  plan_machine 24gb 1
  section "1 x 80 GB"
  plan_machine 80gb 1
  section "8 x 80 GB"
  plan_machine 8x80gb 8
}

stand_in() { # stand_in arithmetic|commonsense|glue: small rows of the same forms and a dtype, for --smoke
  SCRATCH=$(mktemp -d)
  trap 'rm -rf "$SCRATCH"' EXIT
  OUT=${OUT:-$SCRATCH/run}
  DTYPE=$(python scripts/cpu_dtype.py)
  if ! $DRY_RUN; then python scripts/recipes/stand_in.py "$1" "$SCRATCH"; fi
}

evaluate() { # evaluate before|after DATA…: EVAL are the recipe's options
  local when=$1 words=() data
  shift
  for data in "$@"; do words+=(--data "$data"); done
  local what=(--model "$BASE" "${QUANTIZED[@]}")
  if [[ $when == after ]]; then what=(--adapter "$OUT/run"); fi
  run lorasb eval "${EVAL_PROCESSES[@]}" "${what[@]}" "${words[@]}" "${EVAL[@]}" \
    --output-dir "$OUT/$when" --overwrite
}

quantization_of() { # the base is evaluated as it is trained on
  QUANTIZED=()
  local word
  for word in "$@"; do
    if [[ $word == --load-in-4bit ]]; then QUANTIZED=(--load-in-4bit); fi
  done
}

train() {
  local command=("${PROCESSES[@]}" --model "$BASE" --r "$R" "${TRAIN[@]}" "${FIT[@]}"
    --ds-config ds_configs/zero2.json --output-dir "$OUT/run")
  section "the job, without starting it"
  run lorasb doctor "${command[@]}"
  section "train; the same command goes on where it stopped"
  run lorasb train "${command[@]}" --resume auto
}

finish() { # finish SET…: their scores side by side, and what can be done with the run
  section "scores"
  run python scripts/recipes/scores.py "$OUT" "$@"
  if [[ $OUT == "${SCRATCH:-}"/* ]]; then return; fi # gone with the made-up rows
  printf '\nThe adapter is a plain LoRA folder: %s\n' "$OUT/run/adapter"
  printf 'What else can be made of it:\n'
  printf '  lorasb export %q --dtype bf16 --out %q\n' "$OUT/run" "$OUT/exported"
  printf '  lorasb merge %q --out %q\n' "$OUT/run" "$OUT/merged"
}
