#!/usr/bin/env bash
# Serves a vision-language judge with vLLM, for the rewards vllm_evaluate, rational_rewards_t2i, rational_rewards_edit
# and DeQAScore. Everything after the script's name is passed on to `vllm serve`, and wins over what is set here:
#
#   CUDA_VISIBLE_DEVICES=0,1 scripts/start_judge.sh --max-model-len 8192
#   MODEL_PATH=TIGER-Lab/RationalRewards-8B-Edit PORT=8001 scripts/start_judge.sh --host 0.0.0.0
#
# Environment:
#   MODEL_PATH            folder or hub repository              (default: TIGER-Lab/RationalRewards-8B-T2I)
#   SERVED_MODEL_NAME     what requests call it: vlm_model      (default: the last part of MODEL_PATH)
#   PORT                                                        (default: 8000)
#   TENSOR_PARALLEL_SIZE  devices that share one copy           (default: 1)
#   DATA_PARALLEL_SIZE    copies                                (default: devices of CUDA_VISIBLE_DEVICES / the former)
#   VLLM_BIN              the command                           (default: vllm)
#
# It listens on this machine only: vLLM asks nobody for a key. For other machines pass --host and --api-key.
set -euo pipefail

fail() {
  echo "start_judge.sh: $*" >&2
  exit 2
}

require_count() { # name value
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1=$2 must be a whole number from 1"
}

model_path=${MODEL_PATH:-TIGER-Lab/RationalRewards-8B-T2I}
while [[ $model_path == */ && $model_path != / ]]; do model_path=${model_path%/}; done
served_model_name=${SERVED_MODEL_NAME:-${model_path##*/}}
port=${PORT:-8000}
tensor_parallel_size=${TENSOR_PARALLEL_SIZE:-1}
vllm_bin=${VLLM_BIN:-vllm}
require_count PORT "$port"
require_count TENSOR_PARALLEL_SIZE "$tensor_parallel_size"

if [[ -n ${DATA_PARALLEL_SIZE:-} ]]; then
  data_parallel_size=$DATA_PARALLEL_SIZE
elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=, read -r -a devices <<<"$CUDA_VISIBLE_DEVICES"
  if ((${#devices[@]} % tensor_parallel_size)); then
    fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES has ${#devices[@]} devices, which copies of" \
      "TENSOR_PARALLEL_SIZE=$tensor_parallel_size do not use up; set DATA_PARALLEL_SIZE, or name other devices"
  fi
  data_parallel_size=$((${#devices[@]} / tensor_parallel_size))
else
  data_parallel_size=1
fi
require_count DATA_PARALLEL_SIZE "$data_parallel_size"

command -v "$vllm_bin" >/dev/null || fail "VLLM_BIN=$vllm_bin was not found; install vLLM in an environment of its" \
  "own, and activate that or set VLLM_BIN to its vllm"

exec "$vllm_bin" serve "$model_path" \
  --served-model-name "$served_model_name" \
  --host 127.0.0.1 \
  --port "$port" \
  --tensor-parallel-size "$tensor_parallel_size" \
  --data-parallel-size "$data_parallel_size" \
  "$@"
