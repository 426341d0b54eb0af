# The trainers' (and the controller's) environment: Megatron-Core with Transformer Engine. Not yet built or run on a GPU.
#
#   docker build -f launch/images/train.Dockerfile -t agpo-train .
#   enroot import -o agpo-train.sqsh dockerd://agpo-train
#
# agpo_megatron itself is not in the image: the batch script puts the repository on PYTHONPATH.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

# rdma-core, libibverbs1, ibverbs-providers: without them NCCL does not find InfiniBand and uses sockets.
RUN apt-get update && apt-get install -y --no-install-recommends \
    git python3 python3-dev python3-pip python3-venv rdma-core libibverbs1 ibverbs-providers \
    && rm -rf /var/lib/apt/lists/*
COPY launch/images/train.sh launch/images/requirements-train.txt launch/images/nccl.txt launch/images/check_nccl.py \
    launch/requirements-cpu.txt /tmp/recipe/
RUN bash /tmp/recipe/train.sh /opt/agpo && rm -rf /tmp/recipe
ENV PATH=/opt/agpo/bin:$PATH
