#!/usr/bin/env bash
# bash tools/test_gpu.sh [pytest arguments]: runs tests/gpu on the GPUs of this machine; tests that need more GPUs are
# skipped, with the reason.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
prepare_environment "[test]"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Without --confcutdir, tests/conftest.py would hide the GPUs.
exec python -m pytest tests/gpu --confcutdir=tests/gpu -n 0 -rs "$@"
