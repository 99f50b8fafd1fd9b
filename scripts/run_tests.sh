#!/usr/bin/env bash
# Install the requirements of the tests into .venv-dev (once), then lint, type-check and test.
#   bash scripts/run_tests.sh [fast] [pytest arguments]
# "fast" leaves out the tests that compile graphs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
use_environment .venv-dev requirements-dev.txt
[ "${1:-}" != fast ] || set -- --fast "${@:2}"

ruff check .
ruff format --check .
mypy
# compiling a graph uses one core, so two processes halve the time; the tests of a file share a process and its fixtures
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
