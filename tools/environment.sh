# Makes or reuses .venv with megalite installed in it; sourced by tools/test.sh and launcher/quickstart.sh.
#   prepare_environment EXTRAS     ("" or "[test]"); afterwards `python` is the environment's
# A stamp of pyproject.toml and the extras lets a second start install nothing.

need_build_tools() {
    # DeepSpeed compiles its shared-memory op at the first start: g++ and Python's headers.
    local headers
    headers=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    if command -v g++ >/dev/null && [ -f "$headers" ]; then return; fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq g++ python3-dev >/dev/null
    else
        echo "g++ and Python's headers ($headers) are needed: install g++ and python3-dev" >&2
        return 1
    fi
}

prepare_environment() {
    local extras=$1 stamp wanted
    need_build_tools || return 1
    stamp=.venv/installed
    wanted=$(cat pyproject.toml - <<<"$extras" | sha256sum)
    if [ ! -x .venv/bin/python ]; then python3 -m venv .venv || return 1; fi
    if ! grep -qsxF "$wanted" "$stamp"; then
        # torch first: DeepSpeed's build looks for it, and any other torch is gigabytes.
        .venv/bin/python -m pip install -q "torch==2.13.0" || return 1
        .venv/bin/python -m pip install -q -e ".$extras" || return 1
        echo "$wanted" >>"$stamp"
    fi
    PATH=$PWD/.venv/bin:$PATH
    export PATH
}
