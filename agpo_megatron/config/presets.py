"""The four presets: which switches of ``algorithm`` each name sets.

Every preset sets the same seven keys, so that the resolved configuration says where each value came from and two
presets can be compared line by line.

- ``grpo``: group-relative advantages (arXiv:2402.03300, section 4.1), none of AGPO's parts.
- ``agpo_v1``: arXiv:2503.15952 v1: +1 / -1 for groups that are all right / all wrong (eq. A1), length reward (A2).
- ``agpo_v3``: arXiv:2503.15952 v3: loss mask (A3) and loss clip (A4), no length reward.
- ``agpo``: v3's mask and clip with v1's length reward. The length reward acts in mixed groups only, so zero-variance
  groups still have zero variance and belong to the mask.

All four aggregate with ``token_mean``. The GRPO paper averages per sequence first (``seq_mean_token_mean``), but the
GRPO baseline that AGPO's authors compare with is token-mean, and with one aggregation for all a comparison shows
AGPO's parts and nothing else. (A4) also needs it: with ``seq_mean_token_mean`` the on-policy loss of complete groups
is identically zero, and a bound at zero would act on rounding noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _switches(
    *, length: str, zero_variance: str, mask_and_clip: bool, clip_high: float
) -> dict[str, Any]:
    return {
        "length_reward": {"kind": length},
        "advantage": {"zero_variance": zero_variance},
        "loss": {
            "clip_low": 0.2,
            "clip_high": clip_high,
            "aggregation": "token_mean",
            "mask": {"zero_variance": mask_and_clip},
            "clip": {"enabled": mask_and_clip},
        },
    }


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "agpo": _switches(length="agpo", zero_variance="zero", mask_and_clip=True, clip_high=0.28),
    "agpo_v1": _switches(
        length="agpo", zero_variance="constant", mask_and_clip=False, clip_high=0.2
    ),
    "agpo_v3": _switches(length="none", zero_variance="zero", mask_and_clip=True, clip_high=0.28),
    "grpo": _switches(length="none", zero_variance="zero", mask_and_clip=False, clip_high=0.2),
}
DEFAULT_PRESET = "agpo"


def apply_preset(section: Mapping[str, Any]) -> dict[str, Any]:
    """The ``algorithm`` section as written, completed by its preset; a key that is written wins.

    An unknown preset changes nothing: the schema refuses its name afterwards, with the list of those there are.
    """
    name = section.get("preset", DEFAULT_PRESET)
    preset = PRESETS.get(name, {}) if isinstance(name, str) else {}
    return _merge(preset, section)


def preset_keys(name: str) -> dict[str, Any]:
    """What a preset sets, by dotted key below ``algorithm``. Raises KeyError for an unknown name."""
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
