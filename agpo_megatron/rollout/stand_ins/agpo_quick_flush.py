"""A flush of SGLang's cache without a walk through every Python object of the server.

On a CPU SGLang 0.5.23 runs ``gc.collect()`` at each flush, thus at each publish: 0.25 s on two cores, with a model of
0.8 M parameters a fifth of a step. Tensors are freed by their reference counts, cycles by Python's own thresholds.
"""

from __future__ import annotations


def activate() -> None:
    """Leave garbage to Python."""
    from sglang.srt.platforms.cpu import CpuDeviceMixin

    CpuDeviceMixin.empty_cache = lambda self: None
