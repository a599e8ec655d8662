# megalite on CPUs. Written without a Docker daemon at hand: it has not been built yet.
#
#   docker build -t megalite .
#   docker run --rm -it --shm-size 2g -v "$PWD:/work" megalite pretrain my.txt
FROM python:3.11-slim

# g++ and libaio-dev: DeepSpeed compiles what some configs ask for at their first start, its own Adam (torch_adam false)
# and states in files (docs/nvme.md). ssh and pdsh: for runs on several hosts.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libaio-dev openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

# torch first, and for CPUs alone: PyPI's has gigabytes for GPUs.
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu

COPY pyproject.toml README.md LICENSE /source/
COPY ds_configs /source/ds_configs
COPY megalite /source/megalite
RUN pip install --no-cache-dir "/source[data]" && rm -rf /source

ENV DS_ACCELERATOR=cpu
WORKDIR /work
ENTRYPOINT ["megalite"]
CMD ["--help"]
