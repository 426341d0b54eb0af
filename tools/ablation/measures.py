"""Measures of one finished cell: held-out samples problem by problem, and what its training curves say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from agpo_megatron.config import Config
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.controller.evaluation import samples_path
from agpo_megatron.data.rows import read_arrow
from agpo_megatron.observe.metrics import read_metrics

WINDOW = 10  # steps whose standard deviation is the fluctuation at the last of them
SPIKE = 3.0  # gradient norms above this multiple of their median are spikes
SMOOTH = 5  # steps over which training accuracy is averaged


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Per problem [P], in the order of the set: ``accuracy`` over its samples; ``tokens`` of a sample; ``right_tokens``
    of a right sample, NaN where none is right; ``gap``: tokens of right minus those of wrong samples, NaN where it has
    not both. ``truncated``: share of all samples."""

    accuracy: np.ndarray
    tokens: np.ndarray
    right_tokens: np.ndarray
    gap: np.ndarray
    truncated: float


@dataclass(frozen=True, eq=False)
class Measured:
    """One cell. ``before``, ``after``: held-out; ``curves``: a row per step, of ``curves_of``."""

    before: HeldOut
    after: HeldOut
    curves: pd.DataFrame

    def summary(self) -> dict[str, float]:
        """Return the numbers of the cell, NaN where nothing was measured; "late": mean of the last fifth of steps."""
        late = self.curves.tail(max(1, len(self.curves) // 5)).mean()
        norms = self.curves["grad norm"]
        return {
            "accuracy": float(self.after.accuracy.mean()),
            "accuracy before": float(self.before.accuracy.mean()),
            "tokens": float(self.after.tokens.mean()),
            "tokens before": float(self.before.tokens.mean()),
            "gap before": nanmean(self.before.gap),
            "truncated": self.after.truncated,
            "training accuracy, late": float(late["training accuracy"]),
            "loss fluctuation, late": float(late["loss fluctuation"]),
            "gradient fluctuation, late": float(late["gradient fluctuation"]),
            "wasted samples, late": float(late["wasted samples"]),
            "entropy floor": float(self.curves["entropy"].min()),
            "closed gates": float(self.curves["closed"].mean()),
            "gradient spikes": float((norms > SPIKE * norms[norms > 0].median()).mean()),
            "KL": float(self.curves["KL"].mean()),
            "generated tokens": float(self.curves["generated tokens"].sum()),
        }

    def accuracy_at(self, tokens: float) -> float:
        """Return the training accuracy, over ``SMOOTH`` steps, when so many tokens had been generated."""
        spent = self.curves["generated tokens"].cumsum().to_numpy()
        smooth = self.curves["training accuracy"].rolling(SMOOTH, min_periods=1).mean().to_numpy()
        return float(np.interp(tokens, spent, smooth))


def measured(run_dir: Path, config: Config) -> Measured:
    """Read a finished run. Raises DataError for samples that cannot be read."""
    folder, name = RunFolder(run_dir), config.eval.sets[0].shown
    before, after = (
        held_out(read_arrow(samples_path(folder, step, name)).to_pandas())
        for step in (0, config.train.steps)
    )
    return Measured(before, after, curves_of(read_metrics(run_dir), config))


def held_out(samples: pd.DataFrame) -> HeldOut:
    """Reduce a table of ``SAMPLES_SCHEMA`` to its problems."""
    by = samples.groupby("problem", sort=True)
    accuracy, tokens = by["correct"].mean(), by["tokens"].mean()

    def tokens_of(right: bool) -> pd.Series:
        some = samples[samples["correct"] == right]
        return some.groupby("problem")["tokens"].mean().reindex(accuracy.index)

    right = tokens_of(True)
    return HeldOut(
        accuracy.to_numpy(float),
        tokens.to_numpy(float),
        right.to_numpy(float),
        (right - tokens_of(False)).to_numpy(float),
        float((samples["finish_reason"] == "length").mean()),
    )


def curves_of(rows: Sequence[Mapping[str, float]], config: Config) -> pd.DataFrame:
    """Compute what is compared, step by step, from the metrics; NaN where it was not measured."""
    steps = pd.DataFrame(rows).set_index("step")
    once = steps["response/tokens_mean"]  # before it is filled: a batch is generated once
    if (
        config.train.updates_per_batch > 1
    ):  # what is known of a whole batch stands with its first step
        of_batch = ["reward", "response", "group", "mask", "sampling"]
        names = [name for name in steps if name.partition("/")[0] in of_batch]
        steps[names] = steps[names].ffill()

    def metric(key: str, absent: float) -> pd.Series:
        return steps[key].fillna(absent) if key in steps else pd.Series(absent, steps.index)

    closed = metric("loss/clip_gate", 1.0) == 0.0
    replaced = metric("sampling/discarded_groups", 0.0) / config.train.prompts_per_batch
    # Samples that cost a rollout and gave the policy loss nothing: zero-variance groups, replaced ones too, and
    # everything where the gate was closed.
    wasted = (steps["group/zero_variance_frac"] + replaced) / (1.0 + replaced)
    if config.algorithm.advantage.zero_variance == "constant":
        wasted *= 0.0
    samples = config.train.prompts_per_batch * config.rollout.group_size * (1.0 + replaced)
    entropy = metric("policy/entropy", float("nan"))
    norms = metric("grad_norm", float("nan"))
    return pd.DataFrame(
        {
            "training accuracy": steps["reward/accuracy"],
            "response tokens": steps["response/tokens_mean"],
            "generated tokens": (once * samples).fillna(0.0),
            "loss fluctuation": steps["loss/unclipped"]
            .rolling(WINDOW, min_periods=1)
            .std()
            .fillna(0.0),
            # Of its size, since arms divide by other numbers of tokens.
            "gradient fluctuation": norms.rolling(WINDOW, min_periods=2).std()
            / norms.rolling(WINDOW, min_periods=2).mean(),
            "entropy": entropy.where(metric("tokens/trained", 0.0) > 0),
            "wasted samples": wasted.mask(closed, 1.0),
            "closed": closed.astype(float),
            "grad norm": norms,
            "KL": metric("loss/kl", float("nan")),
        }
    )


def nanmean(values: np.ndarray) -> float:
    """Return the mean of what is not NaN; NaN if all is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
