"""The log-prob head, with torch and Triton alone: against fp64, and against other ways to the same result."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agpo_megatron.logprob.fused import LogProbs, selected_logprobs
from agpo_megatron.logprob.projection import Kernels

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "unit"))
from logprob_reference import reference_logprobs
from record import Record, median_seconds

Way = Callable[[], Any]
CHUNK = 4096
# Of a value, in nats, and of a gradient, relative to its largest entry. bf16: inputs are exact, products are summed in
# fp32, gradients of the logits are rounded to 8 bits.
LIMITS = {torch.float32: (2e-5, 2e-4), torch.bfloat16: (2e-3, 2e-2)}


@dataclass(frozen=True)
class Sizes:
    """``cases``: (rows, vocabulary, hidden) of the comparison with fp64; ``timed``: of the measurement."""

    cases: tuple[tuple[int, int, int], ...]
    timed: tuple[int, int, int]


SIZES = {
    "cuda": Sizes(
        ((1024, 128256, 4096), (512, 151936, 8192), (777, 32003, 1000), (1, 128256, 4096)),
        (16384, 128256, 8192),
    ),
    "cpu": Sizes(((33, 515, 64), (1, 97, 32)), (256, 2048, 128)),
}


def problem(
    sizes: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H], head [V, H], targets [T]; logits of a few units."""
    rows, vocabulary, hidden = sizes
    make = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, hidden, generator=make, device=device).to(dtype).requires_grad_()
    w = torch.randn(vocabulary, hidden, generator=make, device=device)
    w = w.mul_(2.0 / hidden**0.5).to(dtype).requires_grad_()
    return x, w, torch.randint(0, vocabulary, (rows,), generator=make, device=device)


def loss_of(result: LogProbs) -> Tensor:
    """Depends on log-prob and entropy, both signs."""
    n = len(result.logprob)
    weights = torch.linspace(-1, 1, n, device=result.logprob.device, dtype=result.logprob.dtype)
    return (weights * result.logprob).sum() / n - 0.1 * result.entropy.mean()


def compare(
    record: Record, sizes: tuple[int, int, int], dtype: torch.dtype, device: str, kernels: Kernels
) -> None:
    x, w, targets = problem(sizes, dtype, device)
    vocabulary = w.shape[0] - 3  # columns of padding
    targets = targets % vocabulary
    found = selected_logprobs(
        x,
        w,
        targets,
        group=None,
        vocab_size=vocabulary,
        temperature=0.8,
        chunk=100,
        kernels=kernels,
    )
    gradients = torch.autograd.grad(loss_of(found), (x, w))
    exact = (x.detach().double().requires_grad_(), w.detach().double().requires_grad_())
    truth = reference_logprobs(*exact, targets, vocab_size=vocabulary, temperature=0.8)
    true_gradients = torch.autograd.grad(loss_of(truth), exact)
    name = f"{str(dtype)[6:]} {kernels} T={sizes[0]} V={sizes[1]} H={sizes[2]}"
    value, gradient = LIMITS[dtype]
    record.close(f"{name}: log-prob", largest(found.logprob - truth.logprob), value)
    record.close(f"{name}: entropy", largest(found.entropy - truth.entropy), value)
    for what, mine, right in zip(("hidden", "head"), gradients, true_gradients, strict=True):
        error = largest(mine.double() - right) / largest(right)
        record.close(f"{name}: gradient of {what}", error, gradient)
    few = torch.arange(0, sizes[0], 3, device=device)
    part = selected_logprobs(
        x[few],
        w,
        targets[few],
        group=None,
        vocab_size=vocabulary,
        temperature=0.8,
        chunk=100,
        kernels=kernels,
    )
    rows = largest(part.logprob - found.logprob[few])
    record.close(f"{name}: every third row alone", rows, value)


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def ours(x: Tensor, w: Tensor, targets: Tensor) -> Way:
    """One pass with a token loss, as the trainer calls it."""

    def way() -> Any:
        loss = selected_logprobs(
            x,
            w,
            targets,
            group=None,
            vocab_size=w.shape[0],
            temperature=1.0,
            chunk=CHUNK,
            token_loss=lambda logprob, _, rows: -logprob / len(targets),
        ).loss
        assert loss is not None
        return torch.autograd.grad(loss, (x, w))

    return way


def peers(x: Tensor, w: Tensor, targets: Tensor, record: Record) -> Iterator[tuple[str, Way]]:
    """Other ways to the mean negative log-prob and its gradients, those that can be imported."""

    def plain() -> Any:
        loss = torch.nn.functional.cross_entropy((x @ w.T).float(), targets)
        return torch.autograd.grad(loss, (x, w))

    yield "plain torch", plain
    if x.is_cuda:
        compiled = torch.compile(
            lambda a, b: torch.nn.functional.cross_entropy((a @ b.T).float(), targets)
        )
        yield "torch.compile", lambda: torch.autograd.grad(compiled(x, w), (x, w))
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        yield "Liger", lambda: torch.autograd.grad(liger(w, x, targets), (x, w))
    else:
        record.skip("Liger's fused linear cross entropy", "liger-kernel is not installed")
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        yield "Apple's", lambda: torch.autograd.grad(linear_cross_entropy(x, w, targets), (x, w))
    else:
        record.skip("Apple's cut cross entropy", "cut-cross-entropy is not installed")
    if importlib.util.find_spec("megatron") and x.is_cuda:
        yield "megatron-core's fused", mcore(x, w, targets)
    else:
        record.skip("megatron-core's fused cross entropy", "megatron-core or CUDA is not there")


def mcore(x: Tensor, w: Tensor, targets: Tensor) -> Way:
    import torch.distributed as dist
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)

    def way() -> Any:
        losses = fused_vocab_parallel_cross_entropy(x @ w.T, targets, dist.group.WORLD)
        return torch.autograd.grad(losses.mean(), (x, w))

    return way


def matmuls(x: Tensor, w: Tensor) -> Way:
    """The three of the head, into memory that exists: no way can be faster that computes with them."""
    a, b = x.detach(), w.detach()
    logits = torch.ones(len(a), len(b), dtype=a.dtype, device=a.device)
    outputs = torch.empty_like(a), torch.empty_like(b)

    def way() -> None:
        torch.mm(a, b.T, out=logits)
        torch.mm(logits, b, out=outputs[0])
        torch.mm(logits.T, a, out=outputs[1])

    return way


@contextmanager
def peak(device: str) -> Iterator[list[int]]:
    """Bytes that are allocated inside beyond what was there, in ``[0]`` afterwards. 0 on a CPU, where none is known."""
    found = [0]
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    yield found
    if device == "cuda":
        found[0] = torch.cuda.max_memory_allocated() - before


def measure(record: Record, device: str) -> None:
    rows, vocabulary, hidden = SIZES[device].timed
    x, w, targets = problem(SIZES[device].timed, torch.bfloat16, device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    floor = median_seconds(matmuls(x, w), wait)
    record.figure("three bare matmuls", 1e3 * floor, "ms")
    flops = 6 * rows * vocabulary * hidden / floor
    record.figure("measured matmul rate", flops / 1e12, "TFLOP/s")
    best, fastest = float("inf"), ""
    for name, way in peers(x, w, targets, record):
        try:
            with peak(device) as memory:
                seconds = median_seconds(way, wait, 3)
        except Exception as error:  # of a peer: out of memory, for instance; it hides nothing
            record.skip(name, f"{type(error).__name__}: {str(error)[:100]}")
            continue
        record.figure(name, 1e3 * seconds, "ms")
        record.figure(f"{name}: peak memory", memory[0] / 1e9, "GB")
        if seconds < best:
            best, fastest = seconds, name
    gpu = device == "cuda"  # a CPU's figures are reported and judged by nothing
    w.main_grad = torch.zeros_like(w, dtype=torch.float32)  # type: ignore[attr-defined]  # as in training
    with peak(device) as memory:
        all_rows = median_seconds(ours(x, w, targets), wait)
    half = median_seconds(ours(x[: rows // 2], w, targets[: rows // 2]), wait)
    record.figure("ours, all rows", 1e3 * all_rows, "ms")
    record.figure("ours over the matmuls", all_rows / floor, most=1.10 if gpu else None)
    record.figure(
        f"ours over the best peer ({fastest})", all_rows / best, most=1.0 if gpu else None
    )
    record.figure("half the rows over the best peer", half / best, most=0.55 if gpu else None)
    logits = 2 * rows * vocabulary
    share = (
        max(memory[0] - x.nbytes, 0) / logits
    )  # beside the gradient of the hidden states, which is a result
    record.figure("peak memory over one bf16 logits tensor", share, most=1 / 8 if gpu else None)


def main() -> None:
    device, path = sys.argv[1:]
    record = Record(Path(path))
    torch.backends.cuda.matmul.allow_tf32 = False
    triton = device == "cuda" and importlib.util.find_spec("triton")
    ways: list[Kernels] = ["torch", "triton"] if triton else ["torch"]
    if not triton:
        record.skip("Triton kernels", "no Triton, or no CUDA device for it")
    for sizes in SIZES[device].cases:
        for dtype in LIMITS:
            for kernels in ways:
                compare(record, sizes, dtype, device, kernels)
    measure(record, device)


if __name__ == "__main__":
    main()
