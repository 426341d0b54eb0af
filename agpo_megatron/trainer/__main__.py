"""``python -m agpo_megatron.trainer CONFIG MODE``: one trainer rank.

Started by the supervisor or by Slurm. Environment: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT as for
torch.distributed; AGPO_CONTROLLER_URL, AGPO_TOKEN; AGPO_ADDRESS (under which the rollout servers reach this node).
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import random
import signal
import sys
import warnings
from pathlib import Path

import torch

from agpo_megatron.algorithm.settings import LossSettings
from agpo_megatron.config import Config, load_config
from agpo_megatron.policy import backend
from agpo_megatron.trainer.channel import Channel, ControllerLost

log = logging.getLogger(__name__)


def main() -> int:
    parser = argparse.ArgumentParser(prog="agpo_megatron.trainer")
    parser.add_argument("config")
    parser.add_argument("mode", choices=["train", "sft", "replay"])
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    faulthandler.register(signal.SIGUSR2)  # the supervisor asks for the stacks of all threads
    config = load_config(arguments.config)
    rank = int(os.environ["RANK"])
    channel = Channel(
        os.environ["AGPO_CONTROLLER_URL"],
        os.environ["AGPO_TOKEN"],
        rank,
        patience=config.cluster.heartbeat_timeout,
    )
    channel.start_heartbeat(device_bytes)
    try:
        serve(config, arguments.mode, channel)
    except ControllerLost as error:
        log.error("%s", error)
        return 3
    except Exception as error:
        channel.report_failure("start or command", f"{type(error).__name__}: {error}")
        log.exception("rank %d ends", rank)
        return 1
    return 0


def device_bytes() -> int:
    """The most device memory that tensors of this process had; 0 before CUDA is in use."""
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.cuda.max_memory_allocated() if in_use else 0


def serve(config: Config, mode: str, channel: Channel) -> None:
    """Build the policy and execute commands until ``stop``."""
    warnings.filterwarnings(
        "ignore", module="megatron"
    )  # "TE is not installed" and its like, at every start
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    backend.activate(config.cluster.device, config.policy.layers)
    random.seed(config.seed)
    # Only after activate(): these import megatron.
    from agpo_megatron.policy.policy import Policy
    from agpo_megatron.trainer.publishing import PolicyPublisher
    from agpo_megatron.trainer.service import TrainerService

    initial = Path(config.sft.base if mode == "sft" and config.sft else config.model.path)
    policy = Policy.build(
        initial,
        config.policy,
        config.train,
        temperature=1.0 if mode == "sft" else config.rollout.temperature,
        seed=config.seed,
        timeout=config.cluster.command_timeout,
    )
    if mode != "sft" and config.algorithm.loss.kl.coef > 0:
        policy.keep_reference()  # before any checkpoint is loaded: the run's initial weights
    loss = LossSettings(policy="nll") if mode == "sft" else config.algorithm.loss
    service = TrainerService(
        policy,
        PolicyPublisher(policy, config),
        channel,
        initial,
        loss,
        config.cluster.command_timeout,
    )
    service.run()


if __name__ == "__main__":
    sys.exit(main())
