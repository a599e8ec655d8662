#!/usr/bin/env bash
# bash tools/test.sh [pytest arguments]: linter, types and all tests, in an environment made for it.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
prepare_environment "[test]"
export OMP_NUM_THREADS=1 DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
ruff check .
pyright
exec python -m pytest "$@"
