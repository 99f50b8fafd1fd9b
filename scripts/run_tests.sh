#!/usr/bin/env bash
# Install what the tests need into .venv-dev (once), then lint, type-check and test.
#   bash scripts/run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
use_environment .venv-dev requirements-dev.txt

ruff check .
ruff format --check .
mypy
# compiling graphs takes one core; two processes halve the time. A file stays in one process, with its fixtures
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
