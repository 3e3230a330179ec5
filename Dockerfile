# An image in which `lorasb` is the command:
#
#   docker build --tag REGISTRY/lorasb-ds:0.1.0 .
#   docker run --rm --init --gpus all --ipc host -v "$PWD:/data" -v lorasb-cache:/cache \
#     REGISTRY/lorasb-ds:0.1.0 train --num-gpus 1 --model mistralai/Mistral-7B-v0.1 --data train.jsonl
#
# docs/launching.md#containers says more. Tokens are given to `docker run` (--env HF_TOKEN), never to the build.

# devel, not runtime: DeepSpeed compiles some operators (Adam on the host, async I/O, qwZ's quantizer) by nvcc
# and g++ when a run first needs them, and Triton its launchers by g++. CUDA's version is that of torch's wheel in
# constraints.txt, which the last step but one checks; cuDNN and NCCL come with that wheel.
FROM nvidia/cuda:13.0.3-devel-ubuntu24.04

# Ubuntu keeps the newest version of a package only, so that one that is pinned cannot be installed for long.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libaio-dev python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/lorasb

# What is downloaded and compiled is kept in /cache.
ENV PATH=/opt/lorasb/bin:$PATH \
    HF_HOME=/cache/huggingface \
    LORASB_CACHE=/cache/lorasb-ds \
    TORCH_EXTENSIONS_DIR=/cache/torch_extensions \
    TRITON_CACHE_DIR=/cache/triton

# The user is set by number, which `runAsNonRoot` of Kubernetes needs. Any other user may run the image, too:
# /cache is as open as /tmp.
RUN useradd --create-home --uid 10001 lorasb \
 && install --directory --mode 1777 /cache /data

# Dependencies first, in layers that a change of the code leaves as they are. torch comes first of them: DeepSpeed's
# build imports it. Further extras: --build-arg EXTRAS=eval,liger
WORKDIR /opt/lorasb/source
ARG EXTRAS=eval
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --constraint constraints.txt torch numpy setuptools wheel ninja \
 && DS_IGNORE_CUDA_DETECTION=1 pip install --no-cache-dir --no-build-isolation --constraint constraints.txt ".[$EXTRAS]"

COPY ds_configs ds_configs
COPY launcher launcher
COPY lorasb_ds lorasb_ds
RUN pip install --no-cache-dir --no-build-isolation --no-deps --force-reinstall .

RUN python -c "import os, torch; assert os.environ['CUDA_VERSION'].startswith(torch.version.cuda), torch.version.cuda" \
 && lorasb --version

USER 10001
WORKDIR /data
VOLUME /cache
ENTRYPOINT ["lorasb"]
CMD ["--help"]
