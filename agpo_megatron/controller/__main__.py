"""``python -m agpo_megatron.controller CONFIG MODE [--replay RUN_DIR]``: the controller role of one run.

Started by the supervisor, not by hand. Environment: AGPO_CONTROLLER_URL (where to listen), AGPO_TOKEN, AGPO_SERVERS
(JSON list of rollout server URLs), AGPO_START (folder of this start); under Slurm AGPO_SIGNAL_LEAD (seconds from its
signal to the time limit).
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import logging
import os
import resource
import signal
import sys
from pathlib import Path

from agpo_megatron.cluster.start_folder import StartFolder
from agpo_megatron.cluster.supervisor import STOPPED
from agpo_megatron.config import load_config
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.controller import assembly
from agpo_megatron.controller.run import StoppedOnRequest

log = logging.getLogger(__name__)


def main() -> int:
    parser = argparse.ArgumentParser(prog="agpo_megatron.controller")
    parser.add_argument("config")
    parser.add_argument("mode", choices=["train", "sft", "eval", "replay"])
    parser.add_argument("--replay", type=Path)
    arguments = parser.parse_args()
    config = load_config(arguments.config, [], None)
    folder = RunFolder(Path(config.run.dir))
    context = assembly.StartContext(
        url=os.environ["AGPO_CONTROLLER_URL"],
        token=os.environ["AGPO_TOKEN"],
        servers=json.loads(os.environ["AGPO_SERVERS"]),
        start=StartFolder(Path(os.environ["AGPO_START"])),
        signal_lead=float(lead) if (lead := os.environ.get("AGPO_SIGNAL_LEAD")) else None,
    )
    log_file = context.start.log("controller")
    logging.basicConfig(
        filename=log_file,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    raise_descriptor_limit()
    try:
        with log_file.open("a") as stacks:  # of all threads, when the supervisor asks for them
            faulthandler.register(signal.SIGUSR2, file=stacks)
            asyncio.run(assembly.execute(arguments.mode, config, folder, context, arguments.replay))
    except StoppedOnRequest as stopped:
        log.info("%s", stopped)
        return STOPPED
    except BaseException as error:
        log.exception("the controller ends")
        sys.stderr.write(f"agpo-megatron: {root_cause(error)}\n")
        return 1
    return 0


def raise_descriptor_limit() -> None:
    """Allow this process as many open files as the system lets it: every request to a server has a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (
        OSError,
        ValueError,
    ) as error:  # the preflight has compared the hard limit, not this one
        log.warning("the limit of open files stays at %d (hard limit %d): %s", soft, hard, error)
    else:
        log.info("open files: at most %d (%d before)", hard, soft)


def root_cause(error: BaseException) -> str:
    """Return the first real error inside the exception groups that asyncio task groups raise."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
