"""Measures log-probs, their entropy and the gradients of a PPO loss, against the usual ways to compute them.

``python tools/bench.py logprob --rows 4096 --vocab 151936 --hidden 256 --kept 1.0 0.5``

All variants start from hidden states [T, H] and an LM head [V, H] and end with dL/dhidden and dL/dhead:

    matmuls            the three matmuls alone, into memory that exists: the floor
    one_pass           selected_logprobs with a token loss, dL/dhead in main_grad, as the trainer runs it
    one_pass_entropy   the same, the loss with an entropy bonus
    two_pass           selected_logprobs, the loss outside
    score              selected_logprobs without gradients
    mcore              logits, megatron-core's vocabulary-parallel cross entropy, unfused
    mcore_fused        logits, megatron-core's fused one (its gradient is rounded to bf16)
    mcore_entropy      logits, a vocabulary-parallel entropy with gradient, then ``mcore`` on a copy, as verl does it
    plain              logits, log-softmax (not with --tp)
    plain_entropy      the same with the entropy (not with --tp)

Variants take turns; the first turn is a warm-up on a sixteenth of the rows. Times are medians over the others, of the
slowest rank: by the clock, and CPU time over the number of threads (cpu), which says more where other work runs. Peak
memory is measured in a process of its own for each, as growth of the resident set beyond inputs, less dL/dhidden and
dL/dhead. "/best": over the best of the other ways; "/mm": over the matmuls. ``--kept`` applies to selected_logprobs
only: the others compute all rows, always.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from agpo_megatron.logprob.fused import selected_logprobs

OURS = ("one_pass", "one_pass_entropy", "two_pass", "score")
OTHERS = ("matmuls", "mcore", "mcore_fused", "mcore_entropy", "plain", "plain_entropy")
WITH_ENTROPY = ("one_pass_entropy", "mcore_entropy", "plain_entropy")
ENTROPY_COEFFICIENT = 1e-3
CLOCKS = ("seconds", "cpu")
MEGABYTE = 2**20


@dataclass(frozen=True)
class Problem:
    """Inputs of one rank. ``hidden`` [T, H], ``weight`` [V / TP, H], the rest [T]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_logprob: Tensor
    advantage: Tensor
    vocab: int
    group: dist.ProcessGroup | None

    def ppo(self, logprob: Tensor, rows: slice) -> Tensor:
        """Compute the clipped loss of each row, weighted 1 / T."""
        ratio = (logprob - self.old_logprob[rows]).exp()
        advantage = self.advantage[rows] / len(self.targets)
        return torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.28) * advantage)

    def first(self, rows: int) -> Problem:
        """Cut the problem to its first rows."""
        cut = (self.targets[:rows], self.old_logprob[:rows], self.advantage[:rows])
        hidden = self.hidden[:rows].detach().requires_grad_()
        return Problem(hidden, self.weight, *cut, self.vocab, self.group)


def make_problem(options: argparse.Namespace, rank: int) -> Problem:
    make = torch.Generator().manual_seed(1)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.rows, options.hidden, generator=make).to(dtype)
    targets = torch.randint(0, options.vocab, (options.rows,), generator=make)
    advantage, noise = torch.randn(2, options.rows, generator=make)
    shard = -(-options.vocab // options.tp)
    make.manual_seed(2 + rank)
    weight = torch.empty(shard, options.hidden).normal_(generator=make)
    weight = weight.mul_(2.0 / options.hidden**0.5).to(dtype).requires_grad_()
    weight.main_grad = torch.zeros(shard, options.hidden)  # type: ignore[attr-defined]
    weight.main_grad.fill_(0.0)  # type: ignore[attr-defined]
    group = dist.group.WORLD if options.tp > 1 else None
    problem = Problem(hidden, weight, targets, noise, advantage, options.vocab, group)
    with torch.no_grad():  # ratios around 1, some of them clipped
        few = problem.first(min(options.rows, 64))
        typical = run_ours(few, "score", options.chunk).logprob.mean()
    old = -noise.abs() * 0.2 + typical
    return Problem(hidden.requires_grad_(), weight, targets, old, advantage, options.vocab, group)


def run_ours(problem: Problem, name: str, chunk: int) -> Any:
    p = problem
    call = functools.partial(
        selected_logprobs,
        p.hidden,
        p.weight,
        p.targets,
        group=p.group,
        vocab_size=p.vocab,
        temperature=1.0,
        chunk=chunk,
    )
    if name == "score":
        with torch.no_grad():
            return call()
    if name == "two_pass":
        loss = p.ppo(call().logprob, slice(0, len(p.targets))).sum()
    elif name == "one_pass":
        loss = call(token_loss=lambda logprob, _, rows: p.ppo(logprob, rows)).loss
    else:
        loss = call(
            token_loss=lambda logprob, entropy, rows: (
                p.ppo(logprob, rows) - ENTROPY_COEFFICIENT / len(p.targets) * entropy
            ),
            entropy_gradient=True,
        ).loss
    return torch.autograd.grad(loss, (p.hidden, p.weight))


class VocabularyParallelEntropy(torch.autograd.Function):
    """Entropy of softmax(logits) over a tensor parallel group, the usual way: the softmax is kept for backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        top = logits.amax(-1)
        if group is not None:
            dist.all_reduce(top, dist.ReduceOp.MAX, group)
        p = (logits - top[:, None]).exp_()
        total = p.sum(-1)
        if group is not None:
            dist.all_reduce(total, group=group)
        p.div_(total[:, None])
        mean_logit = (p * logits).sum(-1)
        if group is not None:
            dist.all_reduce(mean_logit, group=group)
        ctx.save_for_backward(logits, p, mean_logit)
        return top + total.log() - mean_logit

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, p, mean_logit = ctx.saved_tensors
        gradient = (mean_logit[:, None] - logits).mul_(p).mul_(upstream[:, None])
        return gradient, None


def run_other(problem: Problem, name: str) -> Any:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    p = problem
    logits = torch.nn.functional.linear(p.hidden, p.weight)
    rows = slice(0, len(p.targets))
    if name.startswith("plain"):
        log_p = logits.float().log_softmax(-1)
        loss = p.ppo(log_p.gather(1, p.targets[:, None]).squeeze(1), rows).sum()
        if name == "plain_entropy":
            entropy = -(log_p.exp() * log_p).sum(-1)
            loss = loss - ENTROPY_COEFFICIENT * entropy.mean()
        return torch.autograd.grad(loss, (p.hidden, p.weight))
    loss = torch.zeros(())
    group = p.group or dist.group.WORLD
    if name == "mcore_entropy":
        entropy = VocabularyParallelEntropy.apply(logits.float(), p.group)
        loss = -ENTROPY_COEFFICIENT * entropy.mean()
        logits = logits.clone()  # megatron-core's cross entropy works in place
    if name == "mcore_fused":
        cross_entropy = fused_vocab_parallel_cross_entropy(logits, p.targets, group)
    else:
        cross_entropy = vocab_parallel_cross_entropy(logits, p.targets, tp_group=group)
    loss = loss + p.ppo(-cross_entropy, rows).sum()
    return torch.autograd.grad(loss, (p.hidden, p.weight))


class Matmuls:
    """The three matmuls alone, into memory that exists already."""

    def __init__(self, problem: Problem) -> None:
        self.hidden, self.weight = problem.hidden.detach(), problem.weight.detach()
        shape = (len(self.hidden), len(self.weight))
        self.logits = torch.ones(shape, dtype=self.hidden.dtype)
        self.outputs = torch.ones_like(self.hidden), torch.ones_like(self.weight)

    def __call__(self) -> None:
        torch.mm(self.hidden, self.weight.T, out=self.logits)
        torch.mm(self.logits, self.weight, out=self.outputs[0])
        torch.mm(self.logits.T, self.hidden, out=self.outputs[1])


def cases_of(options: argparse.Namespace) -> list[tuple[str, float]]:
    """List the (variant, kept fraction) pairs to measure."""
    cases: list[tuple[str, float]] = []
    for name in options.variants:
        if options.tp > 1 and name.startswith("plain"):
            continue
        cases += [(name, kept) for kept in (options.kept if name in OURS else [1.0])]
    return cases


def runner(problem: Problem, name: str, kept: float, chunk: int) -> Callable[[], Any]:
    if name == "matmuls":
        return Matmuls(problem)
    if name in OURS:
        problem = problem.first(round(kept * len(problem.targets)))
        return functools.partial(run_ours, problem, name, chunk)
    return functools.partial(run_other, problem, name)


def time_cases(options: argparse.Namespace, problem: Problem) -> list[list[tuple[float, float]]]:
    """Measure (seconds, CPU seconds over threads) of each case, in each turn."""
    small = problem.first(max(options.rows // 16, 1))
    cases = cases_of(options)
    for name, kept in cases:
        runner(small, name, kept, options.chunk)()
    seconds: list[list[tuple[float, float]]] = [[] for _ in cases]
    for _ in range(options.repeats):
        for i, (name, kept) in enumerate(cases):
            run = runner(problem, name, kept, options.chunk)
            if options.tp > 1:
                dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            run()
            cpu = (time.process_time() - cpu) / torch.get_num_threads()
            seconds[i].append((time.perf_counter() - start, cpu))
            del run
    return seconds


def peak_of(options: argparse.Namespace, problem: Problem) -> float:
    """Measure the megabytes that the one case of ``options`` needs beyond inputs and results."""
    ((name, kept),) = cases_of(options)
    runner(problem.first(1), name, 1.0, options.chunk)()
    run = runner(problem, name, kept, options.chunk)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    results = run()
    peak = resident("VmHWM") - before
    returned = 0 if name in ("score", "matmuls") else problem.hidden.nbytes * kept
    if name not in OURS and results is not None:
        returned += problem.weight.nbytes  # ours is in main_grad
    return (peak - returned) / MEGABYTE


def resident(field: str = "VmRSS") -> int:
    """Read a memory field of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def rank_main(rank: int, options: argparse.Namespace, folder: str, what: str) -> None:
    warnings.simplefilter("ignore")
    if any(name.startswith("mcore") for name in options.variants):
        from agpo_megatron.policy import backend

        backend.activate("cpu")
    torch.set_num_threads(max(options.threads // options.tp, 1))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{what}", rank=rank, world_size=options.tp
    )
    problem = make_problem(options, rank)
    measured = time_cases(options, problem) if what == "times" else peak_of(options, problem)
    Path(folder, f"{what}.{rank}.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


def measure(options: argparse.Namespace, what: str) -> list[Any]:
    """Collect what each rank measured, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, args=(options, folder, what), nprocs=options.tp)
        files = [Path(folder, f"{what}.{rank}.json") for rank in range(options.tp)]
        return [json.loads(file.read_text()) for file in files]


def report(options: argparse.Namespace) -> list[dict[str, Any]]:
    times = measure(options, "times")
    rows = []
    for i, (name, kept) in enumerate(cases_of(options)):
        row: dict[str, Any] = {"variant": name, "kept": kept}
        for which, clock in enumerate(CLOCKS):
            turns = [max(r[i][turn][which] for r in times) for turn in range(options.repeats)]
            row[clock] = statistics.median(turns)
        if options.memory:
            one = argparse.Namespace(**{**vars(options), "variants": [name], "kept": [kept]})
            row["peak MB"] = max(measure(one, "peak"))
        rows.append(row)
    floor = next((r for r in rows if r["variant"] == "matmuls"), None)
    for row in rows:
        entropy = row["variant"] in WITH_ENTROPY
        rivals = [
            r
            for r in rows
            if r["variant"] in OTHERS[1:] and (r["variant"] in WITH_ENTROPY) == entropy
        ]
        for key in (*CLOCKS, "peak MB"):
            if rivals and key in row:
                row[f"{key}/best"] = row[key] / min(r[key] for r in rivals)
            if floor and key in CLOCKS:
                row[f"{key}/mm"] = row[key] / floor[key]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format each measure, over that of the best other way, and times over the matmuls'."""
    columns = [c for c in rows[-1] if c not in ("variant", "kept")]
    lines = [f"{'variant':18}{'kept':>6}" + "".join(f"{c:>12}" for c in columns)]
    for row in rows:
        cells = "".join(f"{row[c]:12.3f}" if c in row else f"{'-':>12}" for c in columns)
        lines.append(f"{row['variant']:18}{row['kept']:6.2f}{cells}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096, help="T")
    parser.add_argument("--vocab", type=int, default=151936, help="V")
    parser.add_argument("--hidden", type=int, default=256, help="H")
    parser.add_argument("--tp", type=int, default=1, help="processes that share the vocabulary")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--kept", type=float, nargs="+", default=[1.0, 0.5], help="of the rows")
    parser.add_argument("--chunk", type=int, default=480, help="of selected_logprobs")
    parser.add_argument("--threads", type=int, default=2, help="of all processes together")
    parser.add_argument("--repeats", type=int, default=3, help="turns after the warm-up")
    parser.add_argument("--variants", nargs="+", default=[*OURS, *OTHERS], choices=(*OURS, *OTHERS))
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    print(table(report(parser.parse_args())))
    return 0
