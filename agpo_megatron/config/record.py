"""Resolved YAML and package versions: the record of a run's configuration in its folder."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from .schema import Config
from .yaml_core import yaml_line

PACKAGES = [
    "agpo_megatron",
    "torch",
    "megatron-core",
    "sglang",
    "transformer-engine",
    "nvidia-nccl-cu13",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "math-verify",
    "pyarrow",
    "numpy",
    "pydantic",
    "aiohttp",
    "triton",
]


def resolved_yaml(config: Config, provenance: Mapping[str, str] | None = None) -> str:
    """Format the whole configuration as YAML that ``load_config`` reads back to an equal Config.

    With ``provenance`` (of ``resolve_config``) each value that is not a default carries a comment saying what set it.
    """
    return "\n".join(_lines(config.model_dump(), "", 0, provenance or {})) + "\n"


def package_versions() -> dict[str, str]:
    """List the versions of Python and of every installed package that can change a run's numbers."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _lines(
    tree: Mapping[str, Any], prefix: str, depth: int, provenance: Mapping[str, str]
) -> Iterator[str]:
    indent = "  " * depth
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, f"{prefix}{key}.", depth + 1, provenance)
            continue
        origin = provenance.get(prefix + key, "default")
        comment = "" if origin == "default" else f"  # {origin}"
        yield f"{indent}{yaml_line(key, value)}{comment}"
