"""From the name of a reward function to the function."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from agpo_megatron.reward.contract import Problem, Response, Reward

RewardFunction = Callable[[Problem, Response], "float | bool | Reward"]
BUILT_IN = {
    "numeric": "agpo_megatron.reward.numeric:numeric",
    "math": "agpo_megatron.reward.symbolic:math",
    "choice": "agpo_megatron.reward.texts:choice",
    "exact": "agpo_megatron.reward.texts:exact",
    "regex": "agpo_megatron.reward.texts:regex",
    "format": "agpo_megatron.reward.texts:format",
    "code": "agpo_megatron.reward.code:code",
}
REFERENCES = {
    "numeric": "agpo_megatron.reward.numeric:reference",
    "choice": "agpo_megatron.reward.texts:reference_letter",
    "code": "agpo_megatron.reward.code:read_tests",
}
"""Readers of references for built-in functions; they raise ValueError for others. Called before a run begins."""
REMOTE = ("http", "judge")
"""Asked over HTTP by the run itself, not in a worker (remote.py)."""


class RewardError(ValueError):
    """A reward that cannot be used; the message says why and what to do."""


def load_reward(name: str, options: Mapping[str, Any]) -> RewardFunction:
    """The function ``name``: built in, ``package.module:name``, or ``path/to/file.py:name``, its options bound.

    A file is found from the current folder; its own folder can be imported from. Raises RewardError.
    """
    spec = BUILT_IN.get(name, name)
    place, colon, attribute = spec.rpartition(":")
    if not colon or not place or not attribute:
        raise RewardError(
            f"there is no reward {name!r}; built in are {', '.join([*BUILT_IN, *REMOTE])}; one of your own is "
            "written package.module:function or path/to/file.py:function"
        )
    module = _from_file(Path(place)) if place.endswith(".py") else _from_package(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise RewardError(
            f"{place} has no function {attribute!r}; it has {', '.join(found) or 'none'}"
        )
    check_call(name, function, options)
    return partial(function, **options) if options else function


def check_call(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise RewardError unless ``function(problem, response, **options)`` is a call that it takes."""
    if inspect.iscoroutinefunction(function):
        raise RewardError(
            f"reward {name} is async; write a plain function, it runs in a process of its own"
        )
    try:
        signature = inspect.signature(function)
        signature.bind(None, None, **options)
    except TypeError as error:
        raise RewardError(
            f"reward {name} takes {signature}, which is not (problem, response) with the options "
            f"{dict(options)}: {error}"
        ) from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RewardError(f"reward file {path} does not exist (seen from {Path.cwd()})")
    # The same file is one module, however many functions are taken from it; it may be pickled and imported by itself.
    unique = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"reward_file_{unique}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RewardError(
            f"reward file {path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return module


def _from_package(name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder the run was started in
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise RewardError(
            f"reward module {name} cannot be imported: {type(error).__name__}: {error}; install it where the "
            "controller runs, or name a file"
        ) from error
