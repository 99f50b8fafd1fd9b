#!/usr/bin/env bash
# Train a recipe on one GPU device.
#   bash scripts/run_standalone_train_gpu.sh DEVICE_ID CONFIG_PATH [key=value ...]
# `--resume auto` and the other options of train.py may follow too. launch.sh lists the variables.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

standalone_train GPU "$@"
