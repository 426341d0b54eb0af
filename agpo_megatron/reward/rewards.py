"""A run's rewards: which functions score the responses of which source, and the verdicts as samples have them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from agpo_megatron.config.task import PartConfig, RewardConfig, SourceConfig
from agpo_megatron.data.rows import BadRow, as_text, value_at
from agpo_megatron.reward.contract import Problem, Response
from agpo_megatron.reward.loading import BUILT_IN, REFERENCES, REMOTE, RewardError
from agpo_megatron.reward.pool import RewardPool, Verdict
from agpo_megatron.samples import Group

ROW = "row:"
Spec = str | Sequence[PartConfig]


def parts_of(spec: Spec, row: Mapping[str, Any]) -> list[PartConfig]:
    """The functions that ``spec`` (``reward.function``, or ``data.sources[].reward``) means for one row.

    Raises RewardError for ``row:KEY`` where the row names no built-in function.
    """
    if not isinstance(spec, str):
        return list(spec)
    if not spec.startswith(ROW):
        return [PartConfig(name=spec)]
    key = spec.removeprefix(ROW)
    try:
        name = as_text(value_at(row, key), key)
    except BadRow as error:
        raise RewardError(f"reward {spec}: {error}") from error
    if name not in BUILT_IN and name not in REMOTE:
        raise RewardError(
            f"reward {spec}: the row says {name!r}; a row chooses among {', '.join([*BUILT_IN, *REMOTE])}"
        )
    return [PartConfig(name=name)]


def reference_check(spec: Spec) -> Callable[[Mapping[str, Any], str], None]:
    """Return a check that raises ValueError for a row whose reference the functions of ``spec`` could never confirm.

    Known beforehand are a number that is none, tests that are none, and an unknown name in ``row:KEY``.
    """

    def check(row: Mapping[str, Any], answer: str) -> None:
        for part in parts_of(spec, row):
            if part.name in REFERENCES:
                own = {"letters": part.options["letters"]} if "letters" in part.options else {}
                module, _, name = REFERENCES[part.name].partition(":")
                getattr(importlib.import_module(module), name)(answer, **own)

    return check


class Rewards:
    """``async with Rewards(config, sources) as rewards``; workers end with the block, and with this process."""

    def __init__(self, config: RewardConfig, sources: Sequence[SourceConfig]) -> None:
        self._specs: list[Spec] = [
            config.function if source.reward is None else source.reward for source in sources
        ]
        self.pool = RewardPool(config)

    async def __aenter__(self) -> Self:
        await self.pool.__aenter__()
        try:
            named = [s for s in self._specs if not (isinstance(s, str) and s.startswith(ROW))]
            await self.pool.check([parts_of(spec, {}) for spec in named])
        except BaseException:
            await self.pool.__aexit__()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.pool.__aexit__(*error)

    async def score(
        self, problem: Problem, responses: Sequence[Response], source: int
    ) -> list[Verdict]:
        """One verdict per response. ``source``: place of the problem's source among those given. Raises RewardError."""
        return await self.pool.score(
            problem, responses, parts_of(self._specs[source], problem.fields)
        )

    async def score_group(self, group: Group, problem: Problem, source: int) -> Group:
        """The group with the verdict in every sample. Raises RewardError."""
        responses = [
            Response(s.text, len(s.response_tokens), s.finish_reason) for s in group.samples
        ]
        verdicts = await self.score(problem, responses, source)
        samples = [
            replace(
                sample,
                raw_reward=verdict.value,
                correct=verdict.correct,
                reward_parts=verdict.parts,
                reward_error=verdict.reward_error,
            )
            for sample, verdict in zip(group.samples, verdicts, strict=True)
        ]
        return Group(group.prompt, samples)
