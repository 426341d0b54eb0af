"""The rewards of a run's groups, scored by the pool."""

from __future__ import annotations

from dataclasses import replace

from agpo_megatron.config.schema import RewardConfig
from agpo_megatron.reward.contract import Problem, Response
from agpo_megatron.reward.pool import Part, PoolSettings
from agpo_megatron.reward.pool import RewardPool as Pool
from agpo_megatron.samples import Group


class RewardPool(Pool):
    """``async with RewardPool(config) as rewards``."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__(PoolSettings(timeout=config.timeout))
        self._parts = [Part(config.verifier)]

    async def score_group(self, group: Group) -> Group:
        """The group with ``accuracy`` 1.0 or 0.0 in every sample, and ``reward_error`` where verification failed."""
        problem = Problem([{"role": "user", "content": group.prompt.text}], group.prompt.answer)
        responses = [
            Response(s.text, len(s.response_tokens), s.finish_reason) for s in group.samples
        ]
        verdicts = await self.score(problem, responses, self._parts)
        samples = [
            replace(sample, accuracy=float(verdict.correct), reward_error=verdict.error)
            for sample, verdict in zip(group.samples, verdicts, strict=True)
        ]
        return Group(group.prompt, samples)
