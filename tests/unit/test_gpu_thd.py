"""Packs as Transformer Engine is told of them: sequences end to end (THD), padding as sequences of its own."""

from __future__ import annotations

import made
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.policy import backend
from agpo_megatron.policy.context import held_tokens
from agpo_megatron.policy.packing import pack, pack_multiple, sequence_multiple

pytestmark = pytest.mark.processes

LENGTHS = st.lists(st.integers(1, 300), max_size=8)
RECIPES = st.sampled_from(["none", "tensorwise", "blockwise", "mxfp8"])


def policy_of(tp: int, cp: int, recipe: str) -> PolicyConfig:
    return PolicyConfig.model_validate(
        {
            "tensor_parallel": tp,
            "context_parallel": cp,
            "sequence_parallel": tp > 1,
            "fp8": {"recipe": recipe},
        }
    )


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from([1, 2, 8]), st.sampled_from([1, 2, 4]), RECIPES)
def test_every_token_is_in_one_sequence_and_every_rank_has_its_share(
    lengths: list[int], tp: int, cp: int, recipe: str
) -> None:
    backend.activate("cpu")
    from agpo_megatron.policy.attention import transformer_engine_params

    policy = policy_of(tp, cp, recipe)
    sequences = [
        made.sequence(f"s{i}", [1] * n, 1.0, [0] + [1] * (n - 1), 1.0)
        for i, n in enumerate(lengths)
    ]
    batch = pack(sequences, pack_multiple(policy), each=sequence_multiple(policy))
    told = transformer_engine_params(batch.lengths, torch.device("cpu"))
    ends = told.cu_seqlens_q
    assert told.qkv_format == "thd" and ends.dtype == torch.int32
    assert torch.equal(ends, told.cu_seqlens_kv)
    assert int(ends[0]) == 0 and int(ends[-1]) == len(batch.tokens)
    each = ends.diff()
    assert bool((each > 0).all()), "attention kernels refuse empty sequences"
    assert told.max_seqlen_q == told.max_seqlen_kv == int(each.max())
    # Real sequences come first, longest first, each padded to whole chunks of the context-parallel ranks.
    real = sorted(
        (-(-n // sequence_multiple(policy)) * sequence_multiple(policy) for n in lengths),
        reverse=True,
    )
    assert each[: len(real)].tolist() == real
    if real:
        assert int(each.max()) == real[0], "padding must not lengthen what kernels are sized for"
    if cp > 1:
        assert all(n % (2 * cp) == 0 for n in each.tolist())
        held = torch.cat([held_tokens(batch.lengths, cp, r) for r in range(cp)])
        assert held.sort().values.tolist() == list(range(len(batch.tokens)))


def test_the_split_is_that_of_transformer_engine() -> None:
    """``context_parallel`` of its attention: rank r has chunks r and 2 CP - 1 - r of each sequence, so that causal work
    is even; here two sequences of 8 and 4 tokens on two ranks."""
    assert held_tokens([8, 4], 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert held_tokens([8, 4], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


@pytest.mark.parametrize("cp", [2, 4])
def test_a_filler_is_whole_on_every_rank(cp: int) -> None:
    policy = policy_of(2, cp, "blockwise")
    filler = pack([], pack_multiple(policy), each=sequence_multiple(policy))
    assert len(filler.tokens) == cp * 2 * 128 and len(filler.lengths) == 1
    assert len(held_tokens(filler.lengths, cp, 0)) == 2 * 128
