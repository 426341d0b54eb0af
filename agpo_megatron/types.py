"""The nouns that travel between rooms: Prompt, Sample, Group, TrainSequence, WeightVersion.

Plain frozen dataclasses; no behaviour beyond what keeps them consistent. Token lists are Python lists of int,
so this module needs neither numpy nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class WeightVersion:
    """Identity of one set of policy weights.

    ``step``: optimizer steps taken since the run began (0: the initial weights). ``attempt``: which start of the
    run produced them. ``digest``: checksum of the published tensors ("" before the first publish).
    """

    step: int
    attempt: int
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.step}.{self.attempt}.{self.digest}"

    @staticmethod
    def parse(text: str) -> WeightVersion:
        """Inverse of ``str``. Raises ValueError on anything else."""
        step, attempt, digest = text.split(".", 2)
        return WeightVersion(int(step), int(attempt), digest)


@dataclass(frozen=True)
class Prompt:
    """One problem at one place of the prompt stream.

    ``position``: index in the (infinite, seeded) stream; it names the group, so no two groups of a run share it.
    ``tokens``: what the policy sees. ``answer``: what the verifier compares with.
    """

    position: int
    tokens: list[int]
    answer: str
    text: str = ""

    @property
    def group_id(self) -> str:
        return f"g{self.position:09d}"


@dataclass(frozen=True)
class VersionSpan:
    """Response tokens ``[start, end)`` were generated under weight version ``version``."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class Sample:
    """One finished response. All per-token lists have the length of ``response_tokens``.

    ``rollout_logprobs``: log-prob of each response token as the rollout server sampled it (temperature applied).
    ``loss_mask``: 1 where the policy generated the token, 0 where the environment did.
    ``versions``: spans that cover the response; empty for a worked solution, which no policy generated.
    ``finish_reason``: "stop" or "length" (truncated).
    """

    group_id: str
    index: int
    prompt_tokens: list[int]
    response_tokens: list[int]
    rollout_logprobs: list[float]
    loss_mask: list[int]
    versions: list[VersionSpan]
    finish_reason: str
    text: str = ""
    accuracy: float = 0.0
    reward_error: str = ""

    def __post_init__(self) -> None:
        n = len(self.response_tokens)
        if len(self.rollout_logprobs) != n or len(self.loss_mask) != n:
            raise ValueError(
                f"sample {self.sample_id}: {n} response tokens but {len(self.rollout_logprobs)} log-probs "
                f"and {len(self.loss_mask)} mask entries"
            )

    @property
    def sample_id(self) -> str:
        return f"{self.group_id}.{self.index}"

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Group:
    """The G samples of one prompt."""

    prompt: Prompt
    samples: list[Sample]

    @property
    def group_id(self) -> str:
        return self.prompt.group_id


@dataclass(frozen=True)
class TrainSequence:
    """One sequence as the policy trains on it. Per-token lists have the length of ``tokens``.

    Entry ``t`` speaks of predicting ``tokens[t]`` from ``tokens[:t]``; entry 0 is therefore never used.
    ``loss_weight``: w of  L = sum w * l  (design, idea 1), computed once from the global masks, the same for every
    token of ``loss_mask``. ``loss_mask``: 1 where the token trains. ``advantage``: A of the sequence (1.0 for
    supervised tuning). The other lists may be empty: ``rollout_logprobs``, of the server (it was not generated);
    ``old_logprobs``, what the policy's ratio starts from (the current weights: ratio 1); ``ref_logprobs``, of the
    reference policy (no KL term); ``correction``, factors on the policy loss (1).
    """

    sample_id: str
    tokens: list[int]
    loss_weight: float
    loss_mask: list[int]
    advantage: float
    rollout_logprobs: list[float] = field(default_factory=list)
    old_logprobs: list[float] = field(default_factory=list)
    ref_logprobs: list[float] = field(default_factory=list)
    correction: list[float] = field(default_factory=list)

    @property
    def group_id(self) -> str:
        return self.sample_id.rpartition(".")[0]

    def trained(self) -> list[int]:
        """Positions in ``tokens`` of the tokens that train."""
        if self.loss_weight == 0.0:
            return []
        return [t for t in range(1, len(self.tokens)) if self.loss_mask[t]]
