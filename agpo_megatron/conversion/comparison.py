"""Two checkpoints, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from agpo_megatron.conversion.shape import TensorSpec


@dataclass(frozen=True)
class Difference:
    """A tensor that differs. ``max_error``: largest |a - b| (NaN counts as infinite); None where not comparable."""

    name: str
    what: str
    max_error: float | None = None


def differences(
    specs_a: Mapping[str, TensorSpec],
    load_a: Callable[[str], Tensor],
    specs_b: Mapping[str, TensorSpec],
    load_b: Callable[[str], Tensor],
    tolerance: float = 0.0,
) -> Iterator[Difference]:
    """Every tensor that is not in both, or differs in shape, dtype or values.

    ``tolerance`` 0 asks for equal bits; above 0, dtypes may differ and |a - b| <= tolerance in fp64 is enough.
    """
    for name in sorted(set(specs_a) | set(specs_b)):
        if name not in specs_a or name not in specs_b:
            yield Difference(name, "only in " + ("the first" if name in specs_a else "the second"))
            continue
        a, b = specs_a[name], specs_b[name]
        if a.shape != b.shape:
            yield Difference(name, f"shape {list(a.shape)} against {list(b.shape)}")
        elif a.dtype != b.dtype and tolerance == 0.0:
            yield Difference(name, f"dtype {a.dtype} against {b.dtype}")
        else:
            error = _distance(load_a(name), load_b(name), bits=tolerance == 0.0)
            if error is not None and not error <= tolerance:
                yield Difference(name, "values", error)


def _distance(a: Tensor, b: Tensor, bits: bool) -> float | None:
    """Largest |a - b|; None for equal tensors (equal bits if ``bits``, so -0.0 is not 0.0 and a NaN equals itself)."""
    if bits and torch.equal(_bytes(a), _bytes(b)):
        return None
    if a.numel() == 0:
        return None
    error = (a.double() - b.double()).abs().nan_to_num(nan=float("inf")).max().item()
    # Different bits are a difference even where |a - b| is 0.
    return max(error, float.fromhex("0x1p-1074")) if bits else error


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
