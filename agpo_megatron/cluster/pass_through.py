"""Asks the installed SGLang and megatron-core whether the flags and fields that a run hands on to them exist.

Each in its own environment (``environments.py``): by the preflight on a node that has that role, and by ``check``
where the environment is. What belongs to other keys is known without them (``config/pass_through.py``).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from agpo_megatron.cluster.environments import PROBE_SECONDS, VARIABLES, Kind, interpreter
from agpo_megatron.cluster.keeper import die_with_parent
from agpo_megatron.config import Config, ConfigError
from agpo_megatron.config.pass_through import (
    OWNED_SERVER_ARGS,
    SERVER_DEFAULTS,
    owned_server_arg,
)
from agpo_megatron.rollout import server

PROBE = Path(server.__file__).parent / "server_args_probe.py"


def asked_of(kind: Kind, config: Config) -> list[str]:
    """Command that checks what the config hands on to the package of ``kind``; [] when there is nothing to ask."""
    if kind == "trainer":
        fields = config.policy.megatron
        module = "agpo_megatron.policy.megatron_fields"
        return [interpreter(kind), "-m", module, json.dumps(fields)] if fields else []
    given = config.rollout.server_args
    if given.keys() <= set(SERVER_DEFAULTS):
        return []  # the project knows these itself, and the question takes some 8 seconds
    on_cpu = server.device_of(config) == "cpu"
    owned = {n: why for n in OWNED_SERVER_ARGS if (why := owned_server_arg(n, on_cpu))}
    words = {name: server.words(name.replace("_", "-"), value) for name, value in given.items()}
    question = {"given": given, "owned": owned, "words": words}
    return [interpreter(kind), "-P", str(PROBE), json.dumps(question)]


def pass_through_problems(kind: Kind, config: Config) -> list[str]:
    """List what SGLang (kind ``rollout``) or megatron-core (``trainer``) would not take. Raises ConfigError, naming the
    variable of the environment, where it cannot be asked."""
    command = asked_of(kind, config)
    if not command:
        return []
    package = {"trainer": "megatron-core", "rollout": "SGLang"}[kind]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            preexec_fn=die_with_parent,
        )
        found: list[str] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        tail = done.stderr.strip().splitlines()[-1:] if "done" in locals() else [str(error)]
        raise ConfigError(
            f"{package} cannot be asked about its settings by {command[0]} ({' '.join(tail)}); set {VARIABLES[kind]} "
            f"to a Python that has it"
        ) from None
    return found


def check_pass_through_here(config: Config) -> Sequence[str]:
    """Raise ConfigError with every flag and field that the packages do not have; return a note for each package that
    cannot be asked on this machine: the preflight of the run asks it then."""
    wrong: list[str] = []
    notes: list[str] = []
    kinds: tuple[Kind, ...] = ("rollout", "trainer")
    for kind in kinds:
        try:
            wrong += pass_through_problems(kind, config)
        except ConfigError as error:
            notes.append(f"not checked here, but by the preflight of the run: {error}")
    if wrong:
        raise ConfigError(wrong)
    return notes
