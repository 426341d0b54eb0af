"""Plan of an ablation: arms x tasks x seeds (x learning rates) from a YAML file, and the cells that follow from it."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agpo_megatron.config import Config, check_config, load_config
from agpo_megatron.config.yaml_core import parse_yaml

START = "start"
"""Where an arm is named: the part that all arms of a task and seed share."""
Settings = dict[str, Any]


class PlanError(ValueError):
    """The file, or a choice from it, is not usable; the message names cause and fix."""


class Decision(BaseModel):
    """The rule that was fixed before any run. ``within``: accuracy that an arm may lose against the base arm on each
    task. ``controls``: arms that are compared but never chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    within: float = Field(0.01, ge=0)
    controls: list[str] = Field([])


class File(BaseModel):
    """The YAML file. ``config``: configuration of a run, relative to the file. ``settings``: keys for every cell;
    ``tasks`` and ``arms``: keys by name; those of a task also make data and cold start, those of an arm do not.
    ``base``: the arm that the others are compared with. ``learning_rates``: each arm at each of them, if there are any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str
    base: str
    seeds: list[int] = Field(min_length=1)
    tasks: dict[str, Settings] = Field(min_length=1)
    arms: dict[str, Settings] = Field(min_length=1)
    learning_rates: list[float] = Field([])
    settings: Settings = Field({})
    decision: Decision = Decision()

    @model_validator(mode="after")
    def _names(self) -> File:
        unknown = {self.base, *self.decision.controls} - self.arms.keys()
        if unknown:
            raise ValueError(f"base and decision.controls name no arm: {sorted(unknown)}")
        odd = [
            n
            for n in [*self.arms, *self.tasks]
            if not n.translate(dict.fromkeys(map(ord, "_.+-"))).isalnum()
        ]
        if odd or START in self.arms:
            raise ValueError(
                f"names of arms and tasks are letters, digits and _ . + -, and not {START!r}: {odd}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: each once")
        return self


@dataclass(frozen=True)
class Cell:
    """One run: ``arm`` on ``task`` with ``seed``; or, with the arm START, what its arms share."""

    arm: str
    task: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm},{self.task},{self.seed}"


@dataclass(frozen=True)
class Plan:
    """Cells and their settings; ``path``: the file. ``out``: the folder of all runs, absolute. ``further``: arguments
    of the tool beside the file that say which plan it is."""

    path: Path
    out: Path
    file: File
    further: tuple[str, ...] = ()

    @property
    def arms(self) -> dict[str, Settings]:
        """The arms by name; ARM@RATE where there are several learning rates."""
        rates = self.file.learning_rates
        if not rates:
            return self.file.arms
        return {
            f"{arm}@{rate:g}": {**keys, "train.lr": rate}
            for rate in rates
            for arm, keys in self.file.arms.items()
        }

    def base_of(self, arm: str) -> str:
        """Return the arm that ``arm`` is compared with: at the same learning rate."""
        _, at, rate = arm.partition("@")
        return self.file.base + at + rate

    def is_control(self, arm: str) -> bool:
        return arm.partition("@")[0] in self.file.decision.controls

    def starts(self) -> list[Cell]:
        return [Cell(START, task, seed) for seed in self.file.seeds for task in self.file.tasks]

    def cells(self) -> list[Cell]:
        """All cells, seed by seed, so that a table of few seeds is soon complete."""
        return [Cell(arm, s.task, s.seed) for s in self.starts() for arm in self.arms]

    def cell(self, text: str) -> Cell:
        """Return the cell that "arm,task,seed" names. Raises PlanError."""
        known = {str(cell): cell for cell in [*self.starts(), *self.cells()]}
        if text not in known:
            raise PlanError(
                f"--only {text}: give ARM,TASK,SEED with an arm of {', '.join([*self.arms, START])}, a task of "
                f"{', '.join(self.file.tasks)} and a seed of {self.file.seeds}"
            )
        return known[text]

    def run_dir(self, cell: Cell) -> Path:
        return self.out / cell.task / f"seed-{cell.seed}" / cell.arm

    def run_config(self) -> Path:
        return (self.path.parent / self.file.config).resolve()

    def chosen(self, cell: Cell) -> list[str]:
        """Return the settings of a cell as the file has them, "a.b=c" each."""
        keys = {**self.file.settings, **self.file.tasks[cell.task], "seed": cell.seed}
        return assignments(keys) + assignments(self.arms.get(cell.arm, {}))

    def settings(self, cell: Cell) -> list[str]:
        """Return all settings of a cell: for an arm, also where data and cold start of its task and seed are. Raises
        ConfigError."""
        if cell.arm == START:
            return self.chosen(cell)
        made = self.config(Cell(START, cell.task, cell.seed))
        return [
            *self.chosen(cell),
            f"model.path={made.model.path}",
            f"data.path={made.data.path}",
            f"eval.sets={json.dumps([s.model_dump() for s in made.eval.sets])}",
            *([f"sft.base={made.sft.base}", f"sft.path={made.sft.path}"] if made.sft else []),
        ]

    def config(self, cell: Cell) -> Config:
        """Return the configuration of a cell. Raises ConfigError."""
        return load_config(self.run_config(), self.settings(cell), str(self.run_dir(cell)))

    def command(self, cell: Cell) -> str:
        """Return the command that repeats one cell, for somebody else."""
        line = ["python", "tools/ablate.py", str(self.path), *self.further]
        return shlex.join([*line, "--only", str(cell), "--out", "DIR"])

    def base_settings(self) -> str:
        """Return a digest of the configuration that all cells change, as its file has it. Raises OSError."""
        path = self.run_config()
        content, _ = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def assignments(keys: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in flat(keys)]


def flat(keys: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value); sections may be nested. An empty mapping is a value."""
    for key, value in keys.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def read_plan(path: Path, out: Path, more: Sequence[str] = ()) -> Plan:
    """Read a plan and check the configuration of every cell; ``more``: settings for all. Raises PlanError naming the
    file, and ConfigError naming the key."""
    try:
        content, _ = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        file = File.model_validate(content)
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise PlanError(f"{path}: {reason(error)}") from error
    return checked(Plan(path, out.absolute(), with_settings(file, more), sets(more)))


def varied(config: Path, vary: str, seeds: str, out: Path, more: Sequence[str]) -> Plan:
    """Return the plan of ``--vary KEY=a,b --seeds 1,2``: one key of a run's configuration, the first value the base."""
    key, _, listed = vary.partition("=")
    key = "algorithm.preset" if key == "preset" else key
    values = [v for v in listed.split(",") if v]
    if not key or not values:
        raise PlanError(f"--vary {vary}: give KEY=value,value")
    arms = {value: {key: value_of(value)} for value in values}
    try:
        file = File(
            config=str(config.absolute()),
            base=values[0],
            seeds=[int(seed) for seed in seeds.split(",")],
            tasks={"task": {}},
            arms=arms,
        )
    except ValueError as error:  # pydantic's are too
        raise PlanError(f"--vary {vary} --seeds {seeds}: {reason(error)}") from error
    further = ("--vary", vary, "--seeds", seeds, *sets(more))
    return checked(Plan(config, out.absolute(), with_settings(file, more), further))


def sets(more: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for text in more for part in ("--set", text))


def reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()
    )


def with_settings(file: File, more: Sequence[str]) -> File:
    extra = {key: value_of(value) for key, _, value in (text.partition("=") for text in more)}
    return file.model_copy(update={"settings": {**file.settings, **extra}})


def value_of(text: str) -> Any:
    """Read a value as ``--set`` does."""
    content, _ = parse_yaml(f"value: {text}", "--set")
    return content["value"]


def checked(plan: Plan) -> Plan:
    """Resolve and check the configuration of every arm on every task once, before anything runs."""
    first = plan.file.seeds[0]
    for cell in (cell for cell in [*plan.starts(), *plan.cells()] if cell.seed == first):
        config = plan.config(cell)
        check_config(config)
        if not config.eval.sets:
            raise PlanError(
                f"{plan.run_config()}: eval.sets is not set; held-out accuracy is what is compared"
            )
    return plan
