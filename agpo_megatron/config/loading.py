"""Makes a validated, frozen Config of a YAML file, ``--set`` overrides and ``--run-dir``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from agpo_megatron.algorithm.presets import CORRECTION_KIND, preset_keys

from .errors import ConfigError
from .keys import nearest_key, required_below
from .schema import Config, RunConfig
from .yaml_core import parse_yaml

RUN_DIR = "{run_dir}"


class Resolved(NamedTuple):
    """A configuration and where each of its values comes from.

    ``provenance``: dotted key -> "default", "preset NAME", "staleness", "file", "--set" or "--run-dir".
    """

    config: Config
    provenance: dict[str, str]


class _Source(NamedTuple):
    kind: str  # "file", "--set", "--run-dir"
    place: str  # as errors name it: "configs/x.yaml:12", "--set train.lr=fast"


def load_config(
    path: str | Path, overrides: Sequence[str] = (), run_dir: str | None = None
) -> Config:
    """Read and validate a configuration. See ``resolve_config``, which also tells where values come from."""
    return resolve_config(path, overrides, run_dir).config


def resolve_config(
    path: str | Path, overrides: Sequence[str] = (), run_dir: str | None = None
) -> Resolved:
    """Read ``path``, apply ``overrides`` ("a.b=c", c in YAML, in order) and ``run_dir``, fill ``{run_dir}``, validate.

    Precedence: --run-dir, --set, file, preset, schema default. Raises ConfigError with every problem found in the
    keys and values (cross-field checks are ``check_config``'s).
    """
    path = Path(path)
    data, sources = _read_file(path)
    for override in overrides:
        _apply_override(data, sources, override)
    if run_dir is not None:
        _assign(data, ["run", "dir"], run_dir, "--run-dir")
        sources["run.dir"] = _Source("--run-dir", f"--run-dir {run_dir}")
    data = _fill_run_dir(data)
    try:
        # strict: "8" is not 8 and 1 is not true; what looks wrong is wrong.
        config = Config.model_validate(data, strict=True)
    except ValidationError as error:
        raise ConfigError([_explain(e, sources, str(path)) for e in error.errors()]) from None
    return Resolved(config, _provenance(config, sources))


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, _Source]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else Path("configs")
        there = ", ".join(str(p) for p in sorted(folder.glob("*.yaml"))) or "none"
        raise ConfigError(
            f"{path}: no such configuration file; *.yaml files in {folder}: {there}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a UTF-8 text file: {error}") from error
    data, lines = parse_yaml(text, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold `section:` mappings, not a {type(data).__name__}")
    return data, {key: _Source("file", f"{path}:{line}") for key, line in lines.items()}


def _apply_override(data: dict[str, Any], sources: dict[str, _Source], override: str) -> None:
    key, equals, text = override.partition("=")
    key, place = key.strip(), f"--set {override}"
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{place}: must have the form a.b=c, for instance --set train.steps=20")
    # An empty right side is the empty text (data.prefix=), not YAML's null, which is written null.
    value, lines = parse_yaml(text, place) if text.strip() else ("", {})
    _assign(data, key.split("."), value, place)
    for stale in [s for s in sources if s == key or s.startswith(key + ".")]:
        del sources[stale]
    for below in ("", *(f".{name}" for name in lines)):
        sources[key + below] = _Source("--set", place)


def _assign(data: dict[str, Any], path: list[str], value: Any, place: str) -> None:
    node = data
    for depth, part in enumerate(path[:-1], start=1):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            name = ".".join(path[:depth])
            raise ConfigError(f"{place}: {name} is a value, not a section; use --set {name}=VALUE")
    node[path[-1]] = value


def _fill_run_dir(data: dict[str, Any]) -> dict[str, Any]:
    run = data.get("run")
    run_dir = run.get("dir", RunConfig().dir) if isinstance(run, dict) else RunConfig().dir
    if not isinstance(run_dir, str):
        return data  # the schema refuses it, with its place
    if RUN_DIR in run_dir or not run_dir:
        raise ConfigError(f"run.dir: must be a folder's path without {RUN_DIR}, not {run_dir!r}")

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(RUN_DIR, run_dir)
        if isinstance(value, list):
            return [fill(v) for v in value]
        return {k: fill(v) for k, v in value.items()} if isinstance(value, dict) else value

    filled: dict[str, Any] = fill(data)
    return filled


def _explain(error: ErrorDetails, sources: Mapping[str, _Source], path: str) -> str:
    """Format an error as one line: where it is written, the key, what is wrong, what would be right."""
    # What pydantic says of a union's alternatives ("str", "list[PartConfig]") is no part of a key.
    parts = [
        str(p)
        for p in error["loc"]
        if isinstance(p, int) or (re.fullmatch(r"[a-z_]+", p) and p != "str")
    ]
    key = ".".join(parts)
    place, value = _place(key, sources, path), error["input"]
    if error["type"] == "extra_forbidden":
        return f"{place}: {key}: unknown key; nearest valid key: {nearest_key(key)}"
    if error["type"] == "missing":
        needed = required_below(key)
        what = f"the section is missing; it needs {', '.join(needed)}" if needed else "is required"
        return f"{place}: {key}: {what}"
    if error["type"] in ("model_type", "model_attributes_type"):
        if value is None:
            return f"{place}: {key}: is an empty section; give it keys or remove it"
        return f"{place}: {key}: is a section of keys, not {_short(value)}"
    wish = error["msg"].replace("Input should be", "must be", 1)
    hint = ""
    if error["type"] == "string_type" and isinstance(value, bool | int | float):
        hint = f"; write it in quotes: '{value}'"
    return f"{place}: {key}: {wish}, not {_short(value)}{hint}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _place(key: str, sources: Mapping[str, _Source], path: str) -> str:
    """Find where ``key`` is written; for a missing key, where its section is."""
    names = (key, *_ancestors(key))
    for name in names:
        if name in sources:
            return sources[name].place
    for name in names:
        below = (s.place for other, s in sources.items() if other.startswith(name + "."))
        if place := next(below, None):
            return place
    return path


def _ancestors(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _provenance(config: Config, sources: Mapping[str, _Source]) -> dict[str, str]:
    preset = config.algorithm.preset
    unwritten = dict.fromkeys(preset_keys(preset), f"preset {preset}")
    if config.algorithm.loss.correction.kind != "none":
        unwritten[CORRECTION_KIND] = "staleness"
    return {
        key: sources[key].kind if key in sources else unwritten.get(key, "default")
        for key in leaves(config)
    }


def leaves(config: Config) -> dict[str, Any]:
    """List every value of a configuration by dotted key; an absent section is one key with the value None."""
    flat: dict[str, Any] = {}

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, Mapping) and value:
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    walk(config.model_dump(), "")
    return flat
