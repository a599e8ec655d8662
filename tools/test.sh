#!/usr/bin/env bash
# bash tools/test.sh [pytest arguments]: linter, types and all tests, in an environment made for it.
# EVAL=1 installs the extra `eval` too (0.5 GB more), and with it runs the tests of lm-evaluation-harness.
# AIO=1 installs libaio-dev where it is missing (as root, with apt), and with it builds DeepSpeed's async_io, which takes
# minutes once, and runs the tests of docs/nvme.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
prepare_environment "[test,docs${EVAL:+,eval}]"
if [ -n "${AIO:-}" ] && [ ! -e /usr/include/libaio.h ]; then
    apt-get install -y -qq libaio-dev || echo "AIO=1: libaio-dev cannot be installed here" >&2
fi
export OMP_NUM_THREADS=1 DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
ruff check .
ruff format --check .
pyright & # takes one core
types=$!
python -m compileall -q megalite tests # hundreds of processes import them, some where no bytecode may be written
wait "$types"
exec python -m pytest "$@"
