"""The fused log-prob over tensor parallel groups of real processes equals that of one process."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from agpo_megatron.logprob.fused import selected_logprobs
from agpo_megatron.logprob.reference import reference_logprobs

CASES = [  # name, N, vocab, rows per shard at TP=4, temperature, dtype
    ("even", 11, 96, 24, 1.0, torch.float32),
    ("padded", 11, 93, 24, 0.7, torch.float32),
    ("pure padding on the last shard", 11, 70, 24, 0.7, torch.float32),
    ("bf16", 11, 93, 24, 0.7, torch.bfloat16),
    ("no rows", 0, 93, 24, 1.0, torch.float32),
]


def _compare(case, group, shards):
    """One case on one group: this rank's share against the whole head, computed here as well."""
    name, n, vocab, rows, temperature, dtype = case
    make = torch.Generator().manual_seed(7)
    hidden = torch.randn(n, 8, generator=make).to(dtype)
    whole = torch.randn(4 * rows, 8, generator=make).to(dtype)
    targets = torch.randint(0, vocab, (n,), generator=make)
    g, h = torch.randn(2, n, generator=make)
    mine = whole.chunk(shards)[dist.get_rank(group)]

    def run(weight, group):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        got = selected_logprobs(
            x, w, targets, group=group, vocab_size=vocab, temperature=temperature, chunk=4
        )
        (got.logprob * g + got.entropy * h).sum().backward()
        return got.logprob.detach(), got.entropy.detach(), x.grad.float(), w.grad.float()

    logprob, entropy, d_hidden, d_weight = run(mine, group)
    dist.all_reduce(d_hidden, group=group)  # what the caller's mapping does: the parts are partial
    want = run(whole, None)
    want_d_weight = want[3].chunk(shards)[dist.get_rank(group)]
    loose = 1e-6 if dtype == torch.float32 else 2**-7
    for what, got, expected, tol in (
        ("logprob", logprob, want[0], 1e-6),
        ("entropy", entropy, want[1], 1e-6),
        ("d_hidden", d_hidden, want[2], loose),
        ("d_weight", d_weight, want_d_weight, 1e-6 if dtype == torch.float32 else 2**-8),
    ):
        scale = float(expected.abs().max()) if expected.any() else 1.0
        worst = float((got - expected).abs().max()) / scale if got.numel() else 0.0
        assert worst < tol, (name, shards, what, worst)
    both = torch.stack([logprob, entropy])
    others = [torch.empty_like(both) for _ in range(shards)]
    dist.all_gather(others, both, group=group)
    assert all(torch.equal(both, other) for other in others), (name, "ranks differ")
    exact = reference_logprobs(hidden, whole, targets, vocab_size=vocab, temperature=temperature)
    torch.testing.assert_close(logprob.double(), exact.logprob, rtol=2e-6, atol=2e-6)


def _rank(rank, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=4,
        timeout=datetime.timedelta(seconds=60),
    )
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for case in CASES:
        _compare(case, dist.group.WORLD, 4)
        _compare(case, pairs[rank // 2], 2)
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


def test_two_and_four_shards_equal_one(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path / "rendezvous"),), nprocs=4)
