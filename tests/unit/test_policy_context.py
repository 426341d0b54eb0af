"""Who holds which token and which row of a pack under context parallelism. Collectives: tests/parity."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made import sequence

from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.policy import backend

backend.activate("cpu")
from agpo_megatron.policy.attention import buckets_of  # noqa: E402
from agpo_megatron.policy.context import held_tokens, share_of, zigzag  # noqa: E402
from agpo_megatron.policy.packing import (  # noqa: E402
    PAD_TOKEN,
    PackedBatch,
    pack,
    pack_all,
    pack_multiple,
    sequence_multiple,
)
from agpo_megatron.samples import TrainSequence  # noqa: E402

pytestmark = pytest.mark.processes


def group(ranks: int, rank: int) -> Any:
    """What a share asks of a process group."""
    return SimpleNamespace(size=lambda: ranks, rank=lambda: rank)


def sequences(*lengths: int) -> list[TrainSequence]:
    tokens = iter(range(1, 1000))
    return [
        sequence(f"g.{i}", [next(tokens) for _ in range(n)], 0.5, [0] + [1] * (n - 1), 1.0)
        for i, n in enumerate(lengths)
    ]


def test_each_rank_has_an_early_and_a_late_chunk() -> None:
    assert zigzag(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert zigzag(8, 2, 1).tolist() == [2, 3, 4, 5]
    assert held_tokens([8, 4], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_the_pairs_of_causal_attention_evenly(ranks: int) -> None:
    seen = [int((zigzag(12 * ranks, ranks, r) + 1).sum()) for r in range(ranks)]
    assert len(set(seen)) == 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_row_has_one_holder_with_its_own_target(ranks: int) -> None:
    """Also the row at the end of a chunk, whose target is the first token of another rank's."""
    batch = pack(sequences(23, 8, 5, 1), 16 * ranks, each=2 * ranks)
    shares = [share_of(batch, group(ranks, r)) for r in range(ranks)]
    found = []
    for share in shares:
        assert len(share.tokens) == len(batch.tokens) // ranks
        # tokens are all different, so a token says which row it is
        found += zip(share.tokens[share.rows].tolist(), share.targets.tolist(), strict=True)
    rows = zip(batch.tokens[batch.rows].tolist(), batch.targets.tolist(), strict=True)
    assert sorted(found) == sorted(rows)
    assert all(target == token + 1 for token, target in found)


@pytest.mark.parametrize("ranks", [2, 4])
def test_gathered_parts_come_back_in_the_order_of_the_pack(ranks: int) -> None:
    batch = pack(sequences(23, 8, 5, 1), 16 * ranks, each=2 * ranks)
    shares = [share_of(batch, group(ranks, r)) for r in range(ranks)]
    exchange = shares[0].exchange
    assert exchange is not None
    tokens = torch.cat([share.tokens for share in shares])
    assert tokens[exchange.token_order].tolist() == batch.tokens.tolist()
    longest = max(exchange.counts)
    padded = [torch.nn.functional.pad(s.targets, (0, longest - len(s.targets))) for s in shares]
    assert torch.cat(padded)[exchange.row_order].tolist() == batch.targets.tolist()


def test_a_query_sees_what_is_before_it_in_its_whole_sequence() -> None:
    for rank in range(2):
        (bucket,) = buckets_of([12, 8], torch.device("cpu"), 2, rank)
        assert bucket.visible is not None and bucket.keys is not None
        assert (bucket.longest, bucket.keys.longest) == (6, 12)
        for i, n in enumerate((12, 8)):
            seen = bucket.visible[i, 0, : n // 2].sum(-1)
            assert (seen - 1).tolist() == zigzag(n, 2, rank).tolist()


def test_packs_divide_for_every_axis() -> None:
    policy = PolicyConfig(context_parallel=2, tensor_parallel=2, sequence_parallel=True)
    batches: list[PackedBatch] = pack_all(
        [sequences(5, 3), []],
        pack_multiple(policy),
        2,
        each=sequence_multiple(policy),
        same_length=True,
    )
    for batch in batches:
        assert len(batch.tokens) == 32
        assert all(n % 4 == 0 for n in batch.lengths)
    assert batches[0].tokens[:12].tolist() == [1, 2, 3, 4, 5, *[PAD_TOKEN] * 3, 6, 7, 8, PAD_TOKEN]
    assert batches[0].positions[:12].tolist() == [*range(8), *range(4)]


def test_rows_stay_on_the_host_whatever_device_the_batch_is_on() -> None:
    """On a device the rows' places are read by the host, and what a loss looks at is cut on the device."""
    batch = pack(sequences(5, 12, 3), 16, each=4).to(torch.device("meta"))
    share = share_of(batch, group(2, 1))
    assert share.rows.device.type == "cpu"
    assert share.tokens.device.type == share.targets.device.type == "meta"
    weights = share.own(batch.loss).column("loss_weight")
    assert weights.device.type == "meta" and weights.shape == share.targets.shape
