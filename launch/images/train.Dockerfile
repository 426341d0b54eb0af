# The trainers' (and the controller's) environment: Megatron-Core with Transformer Engine. Not yet built or run on a GPU.
#
#   docker build -f launch/images/train.Dockerfile -t agpo-train .
#   enroot import -o agpo-train.sqsh dockerd://agpo-train
#
# agpo_megatron itself is not in the image: the batch script puts the repository on PYTHONPATH.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

RUN apt-get update && apt-get install -y --no-install-recommends git python3 python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY launch/images/train.sh launch/requirements-cpu.txt /tmp/recipe/
RUN bash /tmp/recipe/train.sh /opt/agpo && rm -rf /tmp/recipe
ENV PATH=/opt/agpo/bin:$PATH
