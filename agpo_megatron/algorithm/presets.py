"""The presets: the switches of ``algorithm`` that each name sets. A preset does nothing else.

All presets set the same keys, so that the resolved configuration says where each value came from and two presets can be
compared line by line.

- ``agpo``: v3's mask with v1's length reward, without v3's clip: chosen by measurement (docs/results.md). The length
  reward acts in mixed groups only, so zero-variance groups still have zero variance and are left to the mask.
- ``agpo_v1``: arXiv:2503.15952 v1: +1 / -1 for groups that are all right / all wrong (eq. A1), length reward (A2).
- ``agpo_v3``: arXiv:2503.15952 v3: loss mask (A3) and loss clip (A4, reconstructed; on the whole step: our reading), no
  length reward.
- ``agpo_v3_authors``: the same as in the authors' code: samples with advantage 0 are masked, each micro-batch is
  clipped by itself, dual clip, half the gradient at a tie. Its result depends on the micro-batch size.
- ``grpo_authors``: the GRPO baseline of the authors' scripts: dual clip, and a small KL term in the loss.
- ``agpo_exp``: v3's mask with exponential normalisation for the clip (``loss.clip.kind``: elu, softplus are variants).
- ``grpo`` 2402.03300, ``dr_grpo`` 2503.20783, ``dapo`` 2503.14476, ``gspo`` 2507.18071, ``cispo`` 2506.13585,
  ``rloo`` 2402.14740, ``reinforce_pp`` 2501.03262, ``gmpo`` 2507.20673, ``sapo`` 2511.20347.

AGPO and GRPO aggregate with ``token_mean``. The GRPO paper averages per sequence first (``seq_mean_token_mean``), but
the GRPO baseline that AGPO's authors compare with is token-mean, and with one aggregation for all a comparison shows
AGPO's parts and nothing else. (A4) also needs it: with ``seq_mean_token_mean`` the on-policy loss of complete groups
is identically zero, and a bound at zero would act on rounding noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _switches(
    *,
    length: str = "none",
    length_weight: float = 0.1,
    estimator: str = "group_norm",
    zero_variance: str = "zero",
    policy: str = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token_mean",
    mask: bool = False,
    criterion: str = "group",
    clip: str = "none",
    when_clipped: str = "skip_step",
    scope: str = "batch",
    tie: str = "zero",
    kl: float = 0.0,
) -> dict[str, Any]:
    return {
        "length_reward": {"kind": length, "weight": length_weight},
        "advantage": {"estimator": estimator, "zero_variance": zero_variance},
        "loss": {
            "policy": policy,
            "clip_low": clip_low,
            "clip_high": clip_high,
            "dual_clip": dual_clip,
            "aggregation": aggregation,
            "mask": {"zero_variance": mask, "criterion": criterion},
            "clip": {"kind": clip, "when_clipped": when_clipped, "scope": scope, "tie": tie},
            "kl": {"coef": kl},
        },
    }


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "agpo": _switches(length="agpo", mask=True, clip_high=0.28),
    "agpo_v1": _switches(length="agpo", zero_variance="constant"),
    "agpo_v3": _switches(mask=True, clip="max0", clip_high=0.28),
    "agpo_v3_authors": _switches(
        mask=True,
        criterion="sample",
        clip="max0",
        when_clipped="step",
        scope="micro_batch",
        tie="half",
        dual_clip=3.0,
    ),
    "agpo_exp": _switches(mask=True, clip="exp", clip_high=0.28),
    "grpo": _switches(),
    "grpo_authors": _switches(dual_clip=3.0, kl=0.001),
    "dr_grpo": _switches(estimator="group_center", aggregation="seq_mean_token_sum_norm"),
    "dapo": _switches(
        length="dapo_overlong",
        length_weight=1.0,
        zero_variance="resample",
        clip_high=0.28,
    ),
    "gspo": _switches(
        policy="gspo", clip_low=3e-4, clip_high=4e-4, aggregation="seq_mean_token_mean"
    ),
    "cispo": _switches(policy="cispo", clip_low=1.0, clip_high=0.28),
    "rloo": _switches(estimator="rloo", aggregation="seq_mean_token_sum"),
    "reinforce_pp": _switches(estimator="reinforce_pp"),
    "gmpo": _switches(
        policy="gmpo", clip_low=0.4, clip_high=0.4, aggregation="seq_mean_token_mean"
    ),
    "sapo": _switches(policy="sapo", aggregation="seq_mean_token_mean"),
}
DEFAULT_PRESET = "agpo"


def apply_preset(section: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the ``algorithm`` section with its preset; a key written in the section wins.

    An unknown preset changes nothing: the schema refuses its name afterwards and lists the known ones.
    """
    name = section.get("preset", DEFAULT_PRESET)
    preset = PRESETS.get(name, {}) if isinstance(name, str) else {}
    return _merge(preset, section)


CORRECTION_KIND = "algorithm.loss.correction.kind"


def correct_staleness(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Complete a configuration: where responses may be of older weights (``train.max_staleness`` above 0, or dynamic
    sampling, which runs ahead by up to a batch), the correction is ``tis`` (by token, at most 2) unless its kind is
    written, or ``old_logprobs`` is rollout, which puts the gap into the ratio.

    What is not a section is left to the schema, which refuses it.
    """
    stale, loss = _below(config, "train", "max_staleness"), _below(config, "algorithm", "loss")
    correction, section = _below(loss, "correction"), _below(config, "algorithm")
    if not isinstance(correction, Mapping) or not isinstance(section, Mapping):
        return config
    resamples = _below(apply_preset(section), "advantage", "zero_variance") == "resample"
    if not resamples and (not isinstance(stale, int) or stale < 1):
        return config
    if "kind" in correction or loss.get("old_logprobs") == "rollout":
        return config
    tis: dict[str, Any] = {"algorithm": {"loss": {"correction": {"kind": "tis"}}}}
    return _merge(config, tis)


def _below(tree: Any, *keys: str) -> Any:
    """Return what is at the end of ``keys``; an empty section where nothing is, None where it cannot be."""
    for key in keys:
        tree = tree.get(key, {}) if isinstance(tree, Mapping) else None
    return tree


def preset_keys(name: str) -> dict[str, Any]:
    """Return the settings of a preset, by dotted key below ``algorithm``. Raises KeyError for an unknown name."""
    return _flatten(PRESETS[name], "algorithm.")


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = dict(base)
    for key, value in over.items():
        below = base.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
