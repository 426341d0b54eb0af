"""The data types that the packages share, and ``COLUMNS``: all per-token and per-sequence data of a sample.

Per-token data are numpy arrays from the HTTP client to the gradient. ``COLUMNS`` names each of them once; the Arrow
schemas of the journal, the mapping of its rows and the packing of micro-batches are derived from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Mask = NDArray[np.uint8]
Array = NDArray[Any]


@dataclass(frozen=True)
class Column:
    """One column. ``dtype``: numpy dtype. ``per``: one value per response token, or one per sequence.

    ``source``: "sample" is known with the sample and journaled with it, "step" is decided with the batch and journaled
    with that. ``default``: value for a sequence without the column; None for the tokens and their mask, which every
    sample has: they determine the rows of a pack and are not columns of it.
    """

    name: str
    dtype: str
    per: Literal["token", "sequence"]
    source: Literal["sample", "step"]
    default: float | None


UNKNOWN = float("nan")
COLUMNS = (
    Column("response_tokens", "int32", "token", "sample", None),
    Column("loss_mask", "uint8", "token", "sample", None),
    # log-prob of the token on the rollout server (temperature applied)
    Column("rollout_logprobs", "float32", "token", "sample", UNKNOWN),
    # old log-prob of the ratio; unknown: the current policy's own, so that the ratio is 1
    Column("old_logprobs", "float32", "token", "step", UNKNOWN),
    # log-prob under the reference policy of the KL term
    Column("ref_logprobs", "float32", "token", "step", UNKNOWN),
    # factor of the rollout correction on the policy loss; a token with factor 0 is not trained. Unknown: the loss
    # computes it, or there is none
    Column("correction", "float32", "token", "step", UNKNOWN),
    # shaped reward
    Column("reward", "float64", "sequence", "step", 0.0),
    # A, the same for every token
    Column("advantage", "float64", "sequence", "step", 0.0),
    # w of  L = sum w l  (design, idea 1), the same for every trained token
    Column("loss_weight", "float64", "sequence", "step", 0.0),
    # number of trained tokens
    Column("trained", "int32", "sequence", "step", 0.0),
    # optimizer step within the batch that trains the sequence, from 0
    Column("update", "int32", "sequence", "step", 0.0),
    # optimizer steps between the weights that generated a token and those that the batch starts from, mean over tokens
    Column("staleness", "float64", "sequence", "step", 0.0),
)


def columns(
    per: Literal["token", "sequence"] | None = None, source: Literal["sample", "step"] | None = None
) -> list[Column]:
    """Return the columns of a kind, in the order of ``COLUMNS``."""
    return [c for c in COLUMNS if per in (None, c.per) and source in (None, c.source)]


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
        """Invert ``str``. Raises ValueError on anything else."""
        step, attempt, digest = text.split(".", 2)
        return WeightVersion(int(step), int(attempt), digest)


@dataclass(frozen=True, eq=False)
class Prompt:
    """One problem at one position of the prompt stream.

    ``position``: index in the (infinite, seeded) stream; it names the group, so no two groups of a run share it.
    ``tokens`` [n] int32: input of the policy. ``answer``: the reference. ``source``: name of the data source.
    """

    position: int
    tokens: Ints
    answer: str
    text: str = ""
    source: str = ""

    @property
    def group_id(self) -> str:
        return f"g{self.position:09d}"


@dataclass(frozen=True)
class VersionSpan:
    """Response tokens ``[start, end)`` were generated under weight version ``version``."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Fragment:
    """The tokens of one response that one generation request returned, [m] each.

    ``position``: of the prompt in the stream; ``index``: of the sample in its group; ``start``: place of the first
    token in the response. ``versions``: spans by place in the response. ``finish_reason``: that of the response if
    it ends here, else "".
    """

    position: int
    index: int
    start: int
    tokens: Ints
    logprobs: Floats
    versions: tuple[VersionSpan, ...]
    finish_reason: str = ""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """One finished response of n tokens.

    ``response_tokens`` [n] int32; ``loss_mask`` [n] uint8: 1 where the policy generated the token, 0 where the
    environment did; ``rollout_logprobs`` [n] float32, NaN for a worked solution, which no policy generated.
    ``versions``: spans that cover the response; empty for a worked solution. ``finish_reason``: "stop" or "length"
    (truncated). ``raw_reward``, ``reward_parts``: of the reward function; ``correct``: whether the response solves the
    problem; ``reward_error``: "" or "cause: why there is no verdict". Raises ValueError for arrays of different length.
    """

    group_id: str
    index: int
    prompt_tokens: Ints
    response_tokens: Ints
    loss_mask: Mask
    rollout_logprobs: Floats
    versions: tuple[VersionSpan, ...]
    finish_reason: str
    text: str = ""
    raw_reward: float = 0.0
    correct: bool = False
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    reward_error: str = ""

    def __post_init__(self) -> None:
        _check_lengths(
            self.sample_id,
            len(self.response_tokens),
            {c.name: getattr(self, c.name) for c in columns("token", "sample")},
        )

    @property
    def sample_id(self) -> str:
        return f"{self.group_id}.{self.index}"

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def length(self) -> int:
        """The number of tokens of prompt and response."""
        return len(self.prompt_tokens) + len(self.response_tokens)


@dataclass(frozen=True, eq=False)
class Group:
    """The G samples of one prompt."""

    prompt: Prompt
    samples: list[Sample]

    @property
    def group_id(self) -> str:
        return self.prompt.group_id


@dataclass(frozen=True, eq=False)
class TrainSequence:
    """One sequence as the policy trains on it: a sample's tokens and the known ``COLUMNS`` of it.

    ``prompt_tokens`` [p], ``response_tokens`` [n] int32, ``loss_mask`` [n] uint8. ``columns``: by name, per token [n],
    aligned with the response, or one number per sequence; a missing column has its default. Raises ValueError for
    arrays of different length and for a name that is not in ``COLUMNS``.
    """

    sample_id: str
    prompt_tokens: Ints
    response_tokens: Ints
    loss_mask: Mask
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        per_token = {c.name for c in columns("token")}
        if unknown := self.columns.keys() - {c.name for c in COLUMNS}:
            raise ValueError(
                f"sample {self.sample_id}: {sorted(unknown)} is not in samples.COLUMNS"
            )
        arrays = {n: values for n, values in self.columns.items() if n in per_token}
        _check_lengths(
            self.sample_id, len(self.response_tokens), {"loss_mask": self.loss_mask, **arrays}
        )
        if not self.length:
            raise ValueError(f"sample {self.sample_id} has no tokens; leave it out of the batch")

    @property
    def group_id(self) -> str:
        return group_of(self.sample_id)

    @property
    def length(self) -> int:
        return len(self.prompt_tokens) + len(self.response_tokens)

    @property
    def tokens(self) -> Ints:
        return np.concatenate([self.prompt_tokens, self.response_tokens])

    def scalar(self, name: str) -> float:
        """Return a per-sequence column, or its default."""
        return float(self.columns.get(name, DEFAULTS[name]))

    def trained(self) -> NDArray[np.int64]:
        """Return the response indices of the trained tokens; the first token of a sequence has no prediction."""
        if self.scalar("loss_weight") == 0.0:
            return np.zeros(0, dtype=np.int64)
        mask = self.loss_mask != 0
        if "correction" in self.columns:
            mask &= np.asarray(self.columns["correction"]) != 0
        if not len(self.prompt_tokens):
            mask[0] = False
        return np.flatnonzero(mask)


def group_of(sample_id: str) -> str:
    """Return the id of the group that a sample belongs to."""
    return sample_id.rpartition(".")[0]


DEFAULTS: dict[str, float] = {c.name: c.default for c in COLUMNS if c.default is not None}


def _check_lengths(sample_id: str, count: int, arrays: Mapping[str, Array]) -> None:
    for name, values in arrays.items():
        if len(values) != count:
            raise ValueError(
                f"sample {sample_id}: {count} response tokens but {len(values)} {name}; "
                "all are aligned with the response"
            )
