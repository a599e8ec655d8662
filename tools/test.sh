#!/usr/bin/env bash
# bash tools/test.sh [pytest arguments]: linter, types and all tests, in .venv. EVAL=1 also installs the extra `eval`
# (0.5 GB more), and runs the tests of lm-evaluation-harness. AIO=1 installs libaio-dev if it is missing (as root, with
# apt), so that DeepSpeed's async_io is built, which takes minutes the first time, and the tests of docs/nvme.md run.
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
python -m compileall -q megalite tests # hundreds of processes import them, some without permission to write bytecode
wait "$types"
exec python -m pytest "$@"
