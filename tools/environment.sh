# Makes or reuses .venv with megalite installed in it; sourced by tools/test.sh and the examples in launcher/
#   prepare_environment EXTRAS     ("" or "[test]"); afterwards `python` is the environment's
# A stamp of pyproject.toml and the extras avoids installing again in a second start.

prepare_environment() {
    local extras=$1 stamp wanted
    stamp=.venv/installed
    wanted=$(cat pyproject.toml - <<<"$extras" | sha256sum)
    if [ ! -x .venv/bin/python ]; then python3 -m venv .venv || return 1; fi
    if ! grep -qsxF "$wanted" "$stamp"; then
        # torch first: DeepSpeed's build needs it, and other builds of torch are gigabytes.
        .venv/bin/python -m pip install -q "torch==2.13.0" || return 1
        .venv/bin/python -m pip install -q -e ".$extras" || return 1
        echo "$wanted" >>"$stamp"
    fi
    PATH=$PWD/.venv/bin:$PATH
    export PATH
    # `deepspeed --num_gpus` replaces the user's choice of GPUs; ranks restore it.
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then export MEGALITE_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES; fi
}

# A free port for the rendezvous of ranks.
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

# Ranks, pipe and tensor of the quickstart on a machine with $1 GPUs (0: on the CPU); the data axis is the rest.
quickstart_grid() {
    if (($1 == 0 || $1 >= 8)); then
        echo 8 2 2
    elif (($1 >= 4)); then
        echo 4 2 2
    elif (($1 >= 2)); then
        echo 2 1 2
    else
        echo 1 1 1
    fi
}
