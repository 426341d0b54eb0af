"""Stands for Transformer Engine 2.20.2 on a CPU: its published signatures, and plain torch behind them.

Every argument that megatron-core and this project pass must be one of the signature (there is no ``**kwargs``).
``pytorch.FP8_ROWS`` records the rows of every matmul. The other modules that megatron-core 0.19.2 imports are there by
name; what they hold raises when it is called.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

__version__ = "2.20.2"
BY_NAME = """
common common.recipe pytorch.constants pytorch.cpp_extensions pytorch.cross_entropy
pytorch.distributed pytorch.distributed_weight pytorch.ep pytorch.float8_tensor pytorch.fp8
pytorch.graph pytorch.module pytorch.module._common pytorch.module.base pytorch.module.layernorm
pytorch.module.layernorm_linear pytorch.module.linear pytorch.ops pytorch.ops.basic
pytorch.ops.basic.grouped_linear pytorch.permutation pytorch.quantized_tensor pytorch.router
pytorch.tensor pytorch.tensor.float8_blockwise_tensor pytorch.tensor.float8_tensor
pytorch.tensor.grouped_tensor pytorch.tensor.mxfp8_tensor pytorch.tensor.nvfp4_tensor
pytorch.tensor.utils pytorch.utils
""".split()  # noqa: SIM905
"""Modules that 2.20.2 has and the stub does not write out."""


class Missing:
    """A name that the stub does not have."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(f"the stub of Transformer Engine has no {type(self).__name__}")

    def __init_subclass__(cls) -> None: ...


def look_up(module: str, name: str) -> Any:
    """A submodule, or a class that raises when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)
    whole = f"{module}.{name}"
    if whole.partition(".")[2] in BY_NAME:
        return importlib.import_module(whole)
    return type(name, (Missing,), {})


class _ByName(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        return look_up(self.__name__, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.startswith(__name__ + ".") and name.partition(".")[2] in BY_NAME:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _ByName(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


sys.meta_path.append(_Finder())


def __getattr__(name: str) -> Any:
    return look_up(__name__, name)


from . import pytorch  # noqa: E402, F401
