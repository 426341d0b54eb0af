"""tools/convert_hf_checkpoint.py in this process."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

TOOL = Path(__file__).parents[2] / "tools" / "convert_hf_checkpoint.py"


@cache
def tool() -> Any:
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("convert_hf_checkpoint", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def convert(*command: object) -> int:
    """Exit code of a command line."""
    return int(tool().main([str(word) for word in command]))
