# folora-q for NVIDIA GPUs, with the versions of constraints.txt. docs/install.md has the commands to build and run it.
# Torch brings CUDA's libraries; the base image states the driver that they need (580). Written without Docker at hand: the
# tests check its paths and commands, but nobody has built it yet.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# gcc and Python's headers: Triton compiles a launcher for its kernels, which TRL's loss uses.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/folora-q/bin:$PATH
RUN python3 -m venv /opt/folora-q

# Dependencies change less often than the code: without it this layer is kept.
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY folora_q folora_q
COPY recipes recipes
RUN pip install --no-cache-dir -c constraints.txt .

# Every user may write to the cache and the working folder, so that `docker run --user` leaves your own files behind.
RUN useradd --create-home folora \
    && mkdir -p /cache /work \
    && chmod 1777 /cache /work
ENV HOME=/cache USER=folora HF_HOME=/cache/huggingface FOLORA_Q_CACHE=/cache/folora-q
VOLUME /cache
WORKDIR /work
USER folora
ENTRYPOINT ["folora-q"]
CMD ["--help"]
