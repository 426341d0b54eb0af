"""CPU stand-in for SGLang's CUDA kernel package, put first on PYTHONPATH of a CPU server process only.

SGLang 0.5.23 imports a handful of ``*_cpu`` names of ``sgl_kernel`` at import time as soon as it runs on a CPU, but the
published wheels of that package are CUDA builds (they need libcuda.so.1 and do not hold those names). A CPU without AMX
takes SGLang's native torch path and calls none of them in plain serving (tensor parallel 1, no speculative decoding);
a call is therefore an error that names the kernel, never a silent approximation.
"""

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0.4.10"


def __getattr__(name: str) -> Callable[..., Any]:
    if not name.endswith("_cpu"):
        raise AttributeError(f"module 'sgl_kernel' (CPU stand-in) has no attribute {name!r}")

    def missing(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: the CPU stand-in has no kernels")

    missing.__name__ = name
    return missing
