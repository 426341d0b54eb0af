# The rollout servers' environment: SGLang's own image of the pinned release (torch 2.14.1, CUDA 13) and the few packages
# that the node's supervisor needs. Not yet built or run on a GPU.
#
#   docker build -f launch/images/rollout.Dockerfile -t agpo-rollout .
#   enroot import -o agpo-rollout.sqsh dockerd://agpo-rollout
FROM lmsysorg/sglang:v0.5.23

COPY launch/images/requirements-rollout.txt /tmp/
RUN python3 -m pip install --no-cache-dir -r /tmp/requirements-rollout.txt && rm /tmp/requirements-rollout.txt
