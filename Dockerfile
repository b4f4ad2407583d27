# Two images from one file; docs/image.md has the versions, why, and what of this was built where.
#
#   docker build --target cpu -t megatron-jackpot:cpu .
#   docker build --target gpu -t megatron-jackpot:gpu .
#   ... --build-arg BASE_IMAGE=... (gpu) or CPU_BASE_IMAGE=... (cpu) for a registry of your own
ARG BASE_IMAGE=lmsysorg/sglang:v0.5.23
ARG CPU_BASE_IMAGE=debian:bookworm-slim

# ---- cpu: quickstart and tests -----------------------------------------------------------------------------------
FROM ${CPU_BASE_IMAGE} AS cpu-base
ENV LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive
# libnuma1: sglang; libgomp1: torch; git: provenance. Not pinned: Debian's point releases drop old versions.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates git libgomp1 libnuma1 python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

FROM cpu-base AS cpu-build
ARG TORCH_INDEX=
ENV JACKPOT_HOME=/opt/jackpot JACKPOT_TORCH_INDEX=${TORCH_INDEX} PIP_NO_CACHE_DIR=1
WORKDIR /opt/megatron-jackpot
# Only what the environment depends on, so that a change of code does not make it anew.
COPY tools/env.sh tools/env.sh
COPY requirements/cpu.txt requirements/cpu.txt
COPY megatron_jackpot/servers/cpu_server megatron_jackpot/servers/cpu_server
# Without a compiler it leaves pycosat out, which only reasoning-gym's zebra puzzles use.
RUN bash tools/env.sh && rm -f /opt/jackpot/*.log

FROM cpu-base AS cpu
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron-jackpot" \
      org.opencontainers.image.description="Jackpot reinforcement learning, CPU: quickstart and tests" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN useradd --create-home --uid 1000 jackpot
COPY --from=cpu-build --chown=jackpot:jackpot /opt/jackpot /opt/jackpot
COPY --chown=jackpot:jackpot . /opt/megatron-jackpot
WORKDIR /opt/megatron-jackpot
# A name without the key of the pins, for PATH. The package itself is found through PYTHONPATH.
RUN ln -s /opt/jackpot/env-*/ /opt/jackpot/env
ENV JACKPOT_HOME=/opt/jackpot PATH=/opt/jackpot/env/bin:$PATH PYTHONPATH=/opt/megatron-jackpot PYTHONUNBUFFERED=1
USER 1000
RUN python -W ignore tools/check_image.py --lock requirements/cpu.txt --without pycosat
HEALTHCHECK --interval=60s --timeout=30s CMD ["megatron-jackpot", "--version"]
CMD ["megatron-jackpot", "doctor"]

# ---- gpu: SGLang's own environment for the servers, a second one for the trainer ---------------------------------
FROM ${BASE_IMAGE} AS gpu-build
# Hopper and Blackwell, as Transformer Engine and as torch spell them.
ARG NVTE_CUDA_ARCHS=90;100
ARG TORCH_CUDA_ARCH_LIST=9.0;10.0
ARG TE_TORCH=2.20.2
ARG APEX_COMMIT=10417aceddd7d5d05d7cbf7b0fc2daad1105f8b4
ARG MAX_JOBS=8
ENV NVTE_FRAMEWORK=pytorch PIP_NO_CACHE_DIR=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY requirements/gpu.txt /tmp/gpu.txt
RUN python3.12 -m venv /opt/trainer \
 && /opt/trainer/bin/pip install --no-deps --require-hashes -r /tmp/gpu.txt
# Its torch extension has no wheel on the index: built against the torch that was just installed.
RUN /opt/trainer/bin/pip install --no-deps --no-build-isolation "transformer-engine-torch==${TE_TORCH}"
# NVIDIA's apex: the index's package of that name is another project.
RUN git init -q /tmp/apex \
 && git -C /tmp/apex fetch -q --depth 1 https://github.com/NVIDIA/apex "${APEX_COMMIT}" \
 && git -C /tmp/apex checkout -q FETCH_HEAD \
 && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD="${MAX_JOBS}" \
    /opt/trainer/bin/pip install --no-deps --no-build-isolation /tmp/apex \
 && rm -rf /tmp/apex

FROM ${BASE_IMAGE} AS gpu
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron-jackpot" \
      org.opencontainers.image.description="Jackpot reinforcement learning: SGLang servers and a Megatron trainer" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN id -u 1000 >/dev/null 2>&1 || useradd --create-home --uid 1000 jackpot
COPY --from=gpu-build /opt/trainer /opt/trainer
COPY . /opt/megatron-jackpot
WORKDIR /opt/megatron-jackpot
RUN printf '#!/bin/sh\nexec /opt/trainer/bin/python -m megatron_jackpot.cli "$@"\n' >/usr/local/bin/megatron-jackpot \
 && chmod 755 /usr/local/bin/megatron-jackpot \
 && ln -s "$(command -v python3)" /usr/local/bin/sglang-python
# The run's `python` is the trainer's; servers.python=/usr/local/bin/sglang-python is the servers'.
ENV PATH=/opt/trainer/bin:$PATH PYTHONPATH=/opt/megatron-jackpot PYTHONUNBUFFERED=1
USER 1000
RUN python -W ignore tools/check_image.py --lock requirements/gpu.txt --server-python /usr/local/bin/sglang-python \
      --need transformer_engine.pytorch --need apex
HEALTHCHECK --interval=60s --timeout=30s CMD ["megatron-jackpot", "--version"]
CMD ["megatron-jackpot", "doctor", "--server-python", "/usr/local/bin/sglang-python"]
