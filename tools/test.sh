#!/usr/bin/env bash
# bash tools/test.sh [pytest arguments]: linter, types and all tests, in an environment made for it.
# EVAL=1 installs the extra `eval` too (0.5 GB more), and with it runs the tests of lm-evaluation-harness.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
prepare_environment "[test${EVAL:+,eval}]"
export OMP_NUM_THREADS=1 DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
ruff check .
pyright
exec python -m pytest "$@"
