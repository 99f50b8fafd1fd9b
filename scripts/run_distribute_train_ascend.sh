#!/usr/bin/env bash
# Train a recipe on several Ascend devices.
#   bash scripts/run_distribute_train_ascend.sh CONFIG_PATH [DEVICE_NUM=8] [key=value ...]
#   bash scripts/run_distribute_train_ascend.sh RANK_TABLE_FILE CONFIG_PATH [key=value ...]
# A rank table (*.json, written by hccl_tools.py) lists nodes and their devices. Options of train.py such as
# `--resume auto` may follow. launch.sh lists the environment variables, also those for several nodes.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

set_target Ascend
unset RANK_TABLE_FILE
[ $# -ge 1 ] || usage
if [[ $1 == *.json ]]; then
    [ $# -ge 2 ] || usage
    table=$(existing RANK_TABLE_FILE "$1") || exit 2
    config=$(existing CONFIG_PATH "$2") || exit 2
    shift 2
    check_python
    fields=$("$python" scripts/rank_table.py "$table") || exit 2
    read -r NODE_NUM NODE_RANK MASTER_ADDR ids <<< "$fields"
    read -ra ids <<< "$ids"
    [ "$target" = CPU ] || RANK_TABLE_FILE=$(realpath "$table")
else
    config=$(existing CONFIG_PATH "$1") || exit 2
    shift
    devices=8
    if is_number "${1:-}"; then
        devices=$1
        shift
    fi
    [ "$devices" -ge 1 ] || usage "DEVICE_NUM: must be above 0"
    check_python
    IFS=, read -ra ids <<< "${ASCEND_RT_VISIBLE_DEVICES:-$(seq -s, 0 $((devices - 1)))}"
    [ "$target" = CPU ] || [ "${#ids[@]}" -eq "$devices" ] ||
        fail "ASCEND_RT_VISIBLE_DEVICES: names ${#ids[@]} devices, DEVICE_NUM is $devices"
    [ "$target" != CPU ] || read -ra ids <<< "$(seq -s' ' 0 $((devices - 1)))"
fi
use_devices "${ids[@]}"
run_ranks "$config" "${#ids[@]}" "$@"
