#!/usr/bin/env bash
# Evaluate a checkpoint on one Ascend device.
#   bash scripts/run_eval_ascend.sh DEVICE_ID CONFIG_PATH CHECKPOINT_PATH [key=value ...]
# The log is written next to the checkpoint. launch.sh lists the environment variables.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

evaluate Ascend "$@"
