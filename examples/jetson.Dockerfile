# hetlora in a container for a Jetson with JetPack 7. FROM DOCUMENTATION, 2026-11-27: never built, never run. What to give it: docs/jetson.md, "In a container".
ARG BASE
FROM ${BASE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/hetlora
ENV PATH=/opt/hetlora/bin:/usr/local/cuda/bin:${PATH}

# torch first, so that the kernels are built for it. TORCH_OPTIONS go to pip, as where it takes torch from.
ARG TORCH=torch>=2.10
ARG TORCH_OPTIONS=
RUN pip install 'setuptools>=77' wheel \
    && pip install ${TORCH_OPTIONS} "${TORCH}"

# 11.0: Thor. 8.7: Orin. The build fails where the kernels for the GPU cannot be made.
ARG ARCHS=11.0
COPY . /opt/source
RUN HETLORA_CUDA=1 HETLORA_CUDA_ARCHS="${ARCHS}" MAX_JOBS=2 pip install --no-build-isolation '/opt/source[bench]'

WORKDIR /work
CMD ["hetlora", "info"]
