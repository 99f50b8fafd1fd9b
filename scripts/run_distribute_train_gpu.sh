#!/usr/bin/env bash
# Train a recipe on several GPUs.
#   bash scripts/run_distribute_train_gpu.sh CONFIG_PATH DEVICE_NUM VISIBLE_DEVICES [key=value ...]
# VISIBLE_DEVICES is a list like 0,1,2,3. Options of train.py such as `--resume auto` may follow. launch.sh lists the
# environment variables, also those for several nodes.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

set_target GPU
unset RANK_TABLE_FILE
[ $# -ge 3 ] || usage
config=$(existing CONFIG_PATH "$1") || exit 2
is_number "$2" || usage "DEVICE_NUM: $2 is not a number"
[[ $3 =~ ^[0-9]+(,[0-9]+)*$ ]] || usage "VISIBLE_DEVICES: $3 is not a list like 0,1,2,3"
IFS=, read -ra ids <<< "$3"
[ "${#ids[@]}" -eq "$2" ] || usage "VISIBLE_DEVICES: $3 names ${#ids[@]} devices, DEVICE_NUM is $2"
shift 3
check_python
use_devices "${ids[@]}"
run_ranks "$config" "${#ids[@]}" "$@"
