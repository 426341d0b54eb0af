# The rollout servers' environment: SGLang's own image of the pinned release (torch 2.14.1, CUDA 13), the few packages
# that the node's supervisor needs, and the NCCL of the trainers. Not yet built or run on a GPU.
#
#   docker build -f launch/images/rollout.Dockerfile -t agpo-rollout .
#   enroot import -o agpo-rollout.sqsh dockerd://agpo-rollout
FROM lmsysorg/sglang:v0.5.23

RUN apt-get update && apt-get install -y --no-install-recommends rdma-core libibverbs1 ibverbs-providers \
    && rm -rf /var/lib/apt/lists/*
COPY launch/images/requirements-rollout.txt launch/images/nccl.txt launch/images/check_nccl.py /tmp/recipe/
# sglang is there and must not be installed again; it must be the pinned one.
RUN python3 -c "from importlib.metadata import version; assert version('sglang') == '0.5.23', version('sglang')" \
    && grep -v '^sglang==' /tmp/recipe/requirements-rollout.txt >/tmp/recipe/supervisor.txt \
    && python3 -m pip install --no-cache-dir -r /tmp/recipe/supervisor.txt \
    && python3 -m pip install --no-cache-dir --no-deps -r /tmp/recipe/nccl.txt \
    && python3 /tmp/recipe/check_nccl.py /tmp/recipe/nccl.txt && rm -rf /tmp/recipe
