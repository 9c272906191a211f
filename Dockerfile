# An image for a machine with NVIDIA GPUs: docker build -t motionenhancer . && docker run --gpus all motionenhancer
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv g++ && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir build
WORKDIR /src
COPY . .
# Fails without nvcc; sm_80, sm_90 and PTX for later GPUs.
RUN MEKERNELS_CUDA=1 /opt/build/bin/python -m build --wheel --outdir /wheels

FROM nvidia/cuda:13.0.1-base-ubuntu24.04
# Triton compiles its launcher with a C compiler and Python's headers when a kernel first runs.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY --from=build /wheels /wheels
RUN wheel=$(echo /wheels/*.whl) && pip install --no-cache-dir "motionenhancer[ray] @ file://$wheel" && rm -r /wheels
WORKDIR /work
ENTRYPOINT ["motionenhancer"]
