"""The fused log-prob over tensor parallel groups of real processes against the fp64 reference: every layout of the LM
head and of the hidden states, in one world of four ranks."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from logprob_reference import reference_logprobs

from agpo_megatron.logprob import passes
from agpo_megatron.logprob.fused import selected_logprobs
from agpo_megatron.logprob.rows import select_rows

pytestmark = pytest.mark.processes

T, H, VOCAB, PADDED, TEMPERATURE = 12, 8, 93, 96, 0.7
WAYS = ("one pass", "one pass, entropy", "two pass")
LAYOUTS = [(1, False), (2, False), (2, True), (4, False), (4, True)]  # TP, sequence parallel


class _Scatter(torch.autograd.Function):
    """What Megatron does to embeddings under sequence parallelism: this rank's share; backward gathers."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx, gradient):
        parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size(ctx.group))]
        dist.all_gather(parts, gradient.contiguous(), group=ctx.group)
        return torch.cat(parts), None


class _Lookup(torch.autograd.Function):
    """Embeddings of a vocabulary that is split over ranks: each has the whole sum, and its own rows' gradient."""

    @staticmethod
    def forward(ctx, weight, tokens, whole, first):
        ctx.tokens, ctx.first, ctx.rows = tokens, first, weight.shape[0]
        return whole[tokens]

    @staticmethod
    def backward(ctx, gradient):
        mine = (ctx.tokens >= ctx.first) & (ctx.tokens < ctx.first + ctx.rows)
        d_weight = gradient.new_zeros(ctx.rows, gradient.shape[1])
        return d_weight.index_add_(0, ctx.tokens[mine] - ctx.first, gradient[mine]), *[None] * 3


def _problem(vocab):
    make = torch.Generator().manual_seed(7)
    whole = torch.randn(PADDED, H, generator=make) * 1.5 / H**0.5
    hidden = torch.randn(T, H, generator=make)
    tokens, targets = torch.randint(0, vocab, (2, T), generator=make)
    g, h = torch.randn(2, T, generator=make)
    return whole, hidden, tokens, targets, g, h


def _reference(way, tied, rows, vocab):
    """In fp64, whole: log-prob, entropy, gradients of all hidden states and of the weight, largest logit."""
    whole, hidden, tokens, targets, g, h = _problem(vocab)
    weight = whole.double().requires_grad_()
    states = weight[tokens] if tied else hidden.double().requires_grad_()
    states.retain_grad()
    want = reference_logprobs(
        states[rows], weight, targets[rows], vocab_size=vocab, temperature=TEMPERATURE
    )
    loss = (want.logprob * g[rows]).sum()
    if way != "one pass":
        loss = loss + (want.entropy * h[rows]).sum()
    loss.backward()
    top = float((states @ weight.T).detach().abs().max()) / TEMPERATURE
    return want.logprob.detach(), want.entropy.detach(), states.grad, weight.grad, top


def _run(way, tied, rows, vocab, group, shards, sequence_parallel):
    """On this rank: log-prob, entropy, gradients of its hidden states and of its shard of the weight."""
    whole, hidden, tokens, targets, g, h = _problem(vocab)
    rank = dist.get_rank(group) if group else 0
    weight = whole.chunk(shards)[rank].clone().requires_grad_()
    weight.main_grad = torch.zeros_like(weight)
    weight.zero_out_wgrad = tied
    states = hidden.clone().requires_grad_()
    if tied:
        states = _Lookup.apply(weight, tokens, whole, rank * len(weight))
    if sequence_parallel:
        states = _Scatter.apply(states, group)
    states.retain_grad()
    chosen = select_rows(states, rows, group=group, sequence_parallel=sequence_parallel)
    arguments = {"group": group, "vocab_size": vocab, "temperature": TEMPERATURE, "chunk": 6}
    if way == "two pass":
        got = selected_logprobs(chosen, weight, targets[rows], **arguments)
        loss = (got.logprob * g[rows] + got.entropy * h[rows]).sum()
    else:
        with_entropy = way != "one pass"

        def token_loss(logprob, entropy, part):
            loss = logprob * g[rows][part]
            return loss + entropy * h[rows][part] if with_entropy else loss

        got = selected_logprobs(
            chosen,
            weight,
            targets[rows],
            token_loss=token_loss,
            entropy_gradient=with_entropy,
            **arguments,
        )
        loss = got.loss
    loss.backward()
    d_weight = weight.main_grad + weight.grad if tied else weight.main_grad
    return got.logprob.detach(), got.entropy.detach(), states.grad, d_weight


def _compare(groups, way, layout, tied, kept, vocab):
    shards, sequence_parallel = layout
    group = groups[shards]
    rank = dist.get_rank(group) if group else 0
    case = (way, layout, tied, kept, vocab)
    rows = torch.arange(T) if kept == T else torch.tensor([T - 2] * kept, dtype=torch.int64)
    *values, d_hidden, d_weight = _run(way, tied, rows, vocab, group, shards, sequence_parallel)
    *exact, want_hidden, want_weight, top = _reference(way, tied, rows, vocab)
    for got, want in zip(values, exact, strict=True):
        if kept:
            assert float((got.double() - want).abs().max()) <= 1e-6 * max(1.0, top), case
        if group:
            others = [torch.empty_like(got) for _ in range(shards)]
            dist.all_gather(others, got, group=group)
            assert all(torch.equal(got, other) for other in others), (case, "ranks differ")
    if sequence_parallel:
        want_hidden = want_hidden.chunk(shards)[rank]
    for got, want in (
        (d_hidden, want_hidden),
        (d_weight, want_weight.chunk(shards)[rank]),
    ):
        if not want.any():
            assert not got.any(), (case, "not exactly 0")
        else:
            worst = float((got.double() - want).abs().max() / want.abs().max())
            assert worst <= 1e-5, (case, worst)


def _rank(rank, rendezvous):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=4, timeout=limit
    )
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {1: None, 2: pairs[rank // 2], 4: dist.group.WORLD}
    # no tile, and no chunk, divides its range
    passes.ONE_PASS_COLUMNS, passes.TWO_PASS_COLUMNS, passes.TWO_PASS_ROWS = 7, 10, 5
    for case in itertools.product(WAYS, LAYOUTS, (False, True), (0, 1, T), (VOCAB,)):
        _compare(groups, *case)
    for way in WAYS:
        _compare(groups, way, (4, True), False, T, 70)  # the last shard is padding alone
    # A head that is too small is refused on every rank alike, before any collective.
    with pytest.raises(
        ValueError, match="4 shards x 24 rows = 96, fewer than the vocabulary of 97"
    ):
        selected_logprobs(
            torch.zeros(1, 8),
            torch.zeros(24, 8),
            torch.zeros(1, dtype=torch.int64),
            group=dist.group.WORLD,
            vocab_size=97,
            temperature=1.0,
            chunk=4,
        )
    dist.destroy_process_group()


def test_every_layout_against_fp64(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path / "rendezvous"),), nprocs=4)
