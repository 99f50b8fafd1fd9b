#!/usr/bin/env bash
# Train a recipe on one Ascend device.
#   bash scripts/run_standalone_train_ascend.sh DEVICE_ID CONFIG_PATH [key=value ...]
# Options of train.py such as `--resume auto` may follow. launch.sh lists the environment variables.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

standalone_train Ascend "$@"
