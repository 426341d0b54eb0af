"""The settings of the algorithm as frozen pydantic models, with the names of the configuration (``algorithm.*``).

The configuration holds them, and the code that decides or computes a step gets them as they are. Importing this module
loads neither torch nor numpy: the supervisor reads configurations too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .presets import apply_preset

LengthRewardKind = Literal["none", "agpo", "kimi", "cosine", "dapo_overlong"]
Estimator = Literal[
    "group_norm", "group_center", "rloo", "reinforce_pp", "reinforce_pp_baseline", "batch_norm"
]
ZeroVariance = Literal["zero", "constant", "resample"]
AdaptiveKind = Literal["none", "max0", "exp", "elu", "softplus", "random"]
Scope = Literal["batch", "micro_batch", "group", "sequence", "token"]
Tie = Literal["zero", "half", "full"]
WhenClipped = Literal["step", "skip_step"]
KlEstimator = Literal["k1", "k2", "k3"]
CorrectionKind = Literal["none", "tis", "mis", "icepop"]
CorrectionLevel = Literal["token", "sequence", "sequence_mean"]
TIE = 1e-6
"""Losses that differ by at most this fraction of sum |w n A| are equal: about ten roundings of float32."""
PolicyLossName = Literal["ppo", "gspo", "gspo_token", "cispo", "gmpo", "sapo", "nll"]
AggregationMode = Literal[
    "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"
]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class LengthRewardSettings(Section):
    kind: LengthRewardKind = "none"
    """Length term of the reward, training only: ``agpo`` is eq. A2; docs/algorithm.md, section 2, has the others."""
    weight: float = Field(0.1, ge=0)
    """Its scale (lambda of eq. A2)."""
    groups: Literal["mixed", "all"] = "mixed"
    """``agpo``: pay in groups with right and wrong answers only, or also where all are right."""
    tie: Literal["zero", "full"] = "zero"
    """``agpo``: bonus of right answers that all have one length (a single one, for instance): 0 or ``weight``."""
    buffer: int | None = Field(None, ge=1)
    """``dapo_overlong``: tokens below ``rollout.max_response_tokens`` over which the penalty grows; null: a fifth."""


class AdvantageSettings(Section):
    estimator: Estimator = "group_norm"
    """Estimator of the advantages from the rewards (docs/algorithm.md, section 1)."""
    zero_variance: ZeroVariance = "zero"
    """Groups whose rewards are all equal: advantage 0; +1 (all right) / -1 (all wrong) (AGPO v1, eq. A1); or replaced
    by groups of further prompts (DAPO's dynamic sampling)."""
    resample_factor: int = Field(10, ge=1)
    """``resample``: prompts looked at for a batch at most, as a multiple of ``train.prompts_per_batch``; then the
    earliest zero-variance groups fill it."""
    length_projection: float = Field(0.0, ge=0, le=1)
    """Share that is removed of what an advantage owes to length alone, where the longer answers of a group have the
    higher advantages (eq. G3; this project's own); 0: nothing, 1: all of it."""


class MaskSettings(Section):
    zero_variance: bool = False
    """Drop zero-variance groups from the loss (AGPO v3, eq. A3)."""
    criterion: Literal["group", "sample"] = "group"
    """Drop whole groups by their rewards, or single samples with advantage 0 (the authors' code)."""
    truncated: bool = False
    """Drop truncated responses from the loss (DAPO's overlong filtering)."""
    denominators: Literal["exclude", "keep"] = "exclude"
    """Dropped tokens leave the denominators too, or stay in them and dilute the rest."""


class ClipSettings(Section):
    kind: AdaptiveKind = "none"
    """Function on the policy loss: ``max0`` is AGPO v3's lower bound, reconstructed (eq. A4); ``exp``, ``elu``,
    ``softplus``: eq. 1d.
    ``random``, this project's own, closes as often as ``max0`` would, on steps drawn at random (eq. G2), as a control
    for comparisons."""
    min: float = 0.0
    """The bound of ``max0``."""
    tau: float | None = Field(1.0, gt=0)
    """Scale of ``exp``, ``elu`` and ``softplus``; null: the running standard deviation of the loss (eq. G1)."""
    scope: Scope = "batch"
    """Argument of the function: the loss of the whole optimizer step, or each part by itself (eq. 1e)."""
    on: Literal["policy", "total"] = "policy"
    """The policy loss alone, or with KL and entropy terms."""
    tie: Tie = "zero"
    """Gradient of ``max0`` exactly at the bound."""
    when_clipped: WhenClipped = "skip_step"
    """A closed gate gives a zero gradient: let the optimizer step on it (momentum still moves), or skip the step."""

    @property
    def has_level(self) -> bool:
        """Return whether the controller decides a number for each step, its level (``gate_levels.py``)."""
        exponential = self.kind in ("exp", "elu", "softplus")
        return self.kind == "random" or (exponential and self.tau is None)


class KlSettings(Section):
    coef: float = Field(0.0, ge=0)
    """Weight of the KL term against the initial policy (``model.path``); 0 turns it off."""
    estimator: KlEstimator = "k3"
    """d, d^2 / 2, or e^-d + d - 1 of the log-ratio d."""
    place: Literal["loss", "reward"] = "loss"
    """A term of the loss, or subtracted from the reward of each response (summed over its tokens)."""
    importance: bool = False
    """In the loss: multiply by the policy's ratio, which makes the gradient unbiased."""


class EntropySettings(Section):
    coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus; with ``target`` its first value."""
    target: float | None = Field(None, gt=0)
    """Entropy (nats) below which the bonus acts, with a coefficient that adapts; null keeps ``coef`` fixed."""


class CorrectionSettings(Section):
    kind: CorrectionKind = "none"
    """Weights for the gap between server and trainer: truncated at ``high``, or 0 outside [``low``, ``high``]. Where
    it is not written, ``tis`` with ``train.max_staleness`` above 0 or ``zero_variance: resample`` (unless
    ``old_logprobs`` is ``rollout``)."""
    level: CorrectionLevel = "token"
    """Ratio of a token, of the sequence (product), or its geometric mean."""
    low: float = Field(0.5, ge=0)
    """Lower bound (``mis``, ``icepop``)."""
    high: float = Field(2.0, gt=0)
    """Upper bound."""
    denominators: Literal["exclude", "keep"] = "keep"
    """Tokens of weight 0 leave the denominators too, or stay in them and dilute the rest."""


class LossSettings(Section):
    policy: PolicyLossName = "ppo"
    """Policy loss of a token (docs/algorithm.md, section 3); ``nll`` is the supervised loss of the cold start."""
    old_logprobs: Literal["score", "rollout"] = "score"
    """Source of the ratio's old log-probs: the trainer, which scores them before the first update of a batch (with one
    update per batch nothing is scored and the ratio is 1), or the rollout server."""
    clip_low: float = Field(0.2, gt=0, le=1)
    """Ratio clip below 1 (epsilon low)."""
    clip_high: float = Field(0.28, gt=0)
    """Ratio clip above 1 (epsilon high)."""
    dual_clip: float | None = Field(None, gt=1)
    """``ppo``: bound of the ratio for negative advantages; null turns it off."""
    aggregation: AggregationMode = "token_mean"
    """Aggregation of token losses to one number (docs/algorithm.md, section 4)."""
    norm_length: int | None = Field(None, ge=1)
    """Constant length of ``seq_mean_token_sum_norm``; null: ``rollout.max_response_tokens``."""
    mask: MaskSettings = MaskSettings()
    """Loss mask."""
    clip: ClipSettings = ClipSettings()
    """Adaptive part: loss clip or exponential normalisation."""
    kl: KlSettings = KlSettings()
    """KL to the initial policy."""
    entropy: EntropySettings = EntropySettings()
    """Entropy bonus."""
    correction: CorrectionSettings = CorrectionSettings()
    """Rollout correction."""

    @property
    def kl_coef(self) -> float:
        """Weight of the KL term of the loss; 0 where KL is part of the reward."""
        return self.kl.coef if self.kl.place == "loss" else 0.0

    @property
    def has_other_terms(self) -> bool:
        """Return whether a KL or entropy term has gradients beside the policy loss."""
        return self.kl_coef > 0 or self.entropy.coef > 0

    @property
    def gate_needs_the_step(self) -> bool:
        """Return whether the adaptive part depends on more than one micro-batch."""
        return self.clip.kind != "none" and self.clip.scope in ("batch", "group")

    @property
    def corrects_tokens(self) -> bool:
        """Return whether a token's correction depends on its own log-prob alone and is never 0 (``tis`` by token), so
        that the loss can compute it."""
        return self.correction.kind == "tis" and self.correction.level == "token"

    def scored_weights(self, updates: int) -> tuple[bool, bool]:
        """Return whether a batch of ``updates`` optimizer steps needs the trainer's (old, reference) log-probs."""
        own = (
            (updates > 1 and self.old_logprobs == "score")
            or (self.correction.kind != "none" and not (self.corrects_tokens and updates == 1))
            or self.entropy.target is not None
            or (self.kl.coef > 0 and self.kl.place == "reward")
        )
        return own, self.kl.coef > 0

    def with_entropy(self, coefficient: float) -> LossSettings:
        """Return the same settings with the entropy ``coefficient`` of one step."""
        entropy = self.entropy.model_copy(update={"coef": coefficient})
        return self.model_copy(update={"entropy": entropy})

    def with_gate_level(self, levels: Sequence[float], update: int) -> LossSettings:
        """Return the same settings with the gate of optimizer step ``update`` of a batch, whose ``levels`` the
        controller has decided (``gate_levels.py``); they are empty where the gate has none."""
        if not self.clip.has_level:
            return self
        name = "min" if self.clip.kind == "random" else "tau"
        return self.model_copy(update={"clip": self.clip.model_copy(update={name: levels[update]})})


class AlgorithmSettings(Section):
    preset: Literal[
        "agpo",
        "agpo_v1",
        "agpo_v3",
        "agpo_v3_authors",
        "agpo_exp",
        "grpo",
        "grpo_authors",
        "dr_grpo",
        "dapo",
        "gspo",
        "cispo",
        "rloo",
        "reinforce_pp",
        "gmpo",
        "sapo",
    ] = "agpo"
    """Sets the switches below; a key written beside it wins. The resolved config shows every value."""
    length_reward: LengthRewardSettings = LengthRewardSettings()
    """Length term of the reward."""
    advantage: AdvantageSettings = AdvantageSettings()
    """Advantages."""
    loss: LossSettings = LossSettings()
    """Policy loss."""

    @property
    def shaping_separates(self) -> bool:
        """Return whether a term of the reward is meant to act in groups whose raw rewards agree: then the shaped
        rewards decide whether a group has variance."""
        length, kl = self.length_reward, self.loss.kl
        acts = length.kind not in ("none", "agpo") or (
            length.kind == "agpo" and length.groups == "all"
        )
        return (acts and length.weight > 0) or (kl.coef > 0 and kl.place == "reward")

    @model_validator(mode="before")
    @classmethod
    def _complete_from_preset(cls, section: Any) -> Any:
        return apply_preset(section) if isinstance(section, Mapping) else section
