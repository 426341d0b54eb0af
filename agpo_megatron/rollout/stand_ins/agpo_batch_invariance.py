"""SGLang's deterministic inference on a CPU: what a sequence computes does not depend on what else is in the batch.

SGLang's own batch-invariant kernels are Triton's, and its seeded sampling needs a hash of the CUDA package. Here are
plain torch forms of both; attention is agpo_batched_attention.py's. Active with
``--enable-deterministic-inference`` only.
"""

from __future__ import annotations

import os
from typing import Any

import torch

ROWS = 16
"""A matrix product with fewer rows takes other kernels of the BLAS, which sum in another order: measured with MKL in
fp32, sums of 128 to 1536 terms. Other precisions were not."""


def wanted() -> bool:
    """Return whether this server infers deterministically; SGLang sets the variable, and server.py before it."""
    return os.environ.get("SGLANG_ENABLE_DETERMINISTIC_INFERENCE") == "1"


def mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left [n, k] @ right [k, m]``, each row as in a product of any number of rows."""
    count = len(left)
    # Always a copy: where a view begins in memory, and its strides, change the sums of the BLAS too.
    padded = left.new_zeros(max(count, ROWS), left.shape[1])
    padded[:count] = left
    out = left.new_empty(len(padded), right.shape[1])
    # The variant with `out` is another operator, which stays torch's own.
    return torch.mm(padded, right, out=out)[:count]


def addmm(
    bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
) -> torch.Tensor:
    """``beta * bias + alpha * left @ right``."""
    return beta * bias + alpha * mm(left, right)


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """MurmurHash3 (32 bit, public domain, Austin Appleby) of the blocks seed (low, high), position, column.

    ``seed`` [n] uint64, ``positions`` [n], ``columns`` [m]; returns [n, m] int64 in [0, 2^32), as
    sglang/kernels/ops/sampling/murmur_hash.py does on a GPU.
    """
    word = 0xFFFFFFFF
    seeds, places = seed.to(torch.int64)[:, None], positions.to(torch.int64)[:, None]
    found = torch.zeros_like(seeds)
    for block in (seeds & word, (seeds >> 32) & word, places, columns[None]):
        mixed = _rotated(_times(block, 0xCC9E2D51), 15)
        found = _rotated(found ^ _times(mixed, 0x1B873593), 13)
        found = (found * 5 + 0xE6546B64) & word
    found = found ^ 16  # bytes hashed
    found = _times(found ^ (found >> 16), 0x85EBCA6B)
    found = _times(found ^ (found >> 13), 0xC2B2AE35)
    return found ^ (found >> 16)


def _times(value: torch.Tensor, factor: int) -> torch.Tensor:
    """Product modulo 2^32 of ``value``, int64 in [0, 2^32); an overflow beyond 2^63 leaves the low bits right."""
    return (value * factor) & 0xFFFFFFFF


def _rotated(value: torch.Tensor, bits: int) -> torch.Tensor:
    return ((value << bits) | (value >> (32 - bits))) & 0xFFFFFFFF


def _enable() -> None:
    """Stand in for ``sglang.srt.batch_invariant_ops.enable_batch_invariant_mode``."""
    global _library
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("aten::mm", mm, "CPU")
    _library.impl("aten::addmm", addmm, "CPU")


_library: torch.library.Library | None = None
_hashes = torch.library.Library("sgl_kernel", "FRAGMENT")


def activate() -> None:
    """Register all of it, in a server that wants it."""
    if not wanted():
        return
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups.choices import add_deterministic_attention_backend_choices

    add_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = _enable
    _hashes.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
    _hashes.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
