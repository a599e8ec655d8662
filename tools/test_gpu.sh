#!/usr/bin/env bash
# bash tools/test_gpu.sh [pytest arguments]: the tests of tests/gpu on the GPUs of this machine; those that need more of
# them are skipped, each with its reason.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
prepare_environment "[test]"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Above tests/gpu are the settings of the other tests, which hide GPUs.
exec python -m pytest tests/gpu --confcutdir=tests/gpu -n 0 -rs "$@"
