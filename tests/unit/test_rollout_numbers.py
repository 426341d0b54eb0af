"""A server's long arrays of numbers: the fast way and the ordinary decoder give the same."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from agpo_megatron.rollout.numbers import read_logprobs, read_tokens

COMPACT, SPACED = (",", ":"), (", ", ": ")


@pytest.mark.parametrize("separators", [COMPACT, SPACED])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 100])
def test_values_are_those_of_json(count: int, separators: tuple[str, str]) -> None:
    rng = np.random.default_rng(count)
    tokens = rng.integers(0, 150000, count)
    logprobs = -(rng.standard_exponential(count, np.float32) ** 5)
    entries = [[lp, t, None] for lp, t in zip(logprobs.tolist(), tokens.tolist(), strict=True)]
    found, echoed = read_logprobs(msgspec.Raw(json.dumps(entries, separators=separators).encode()))
    assert np.array_equal(found, logprobs) and np.array_equal(echoed, tokens)
    alone = read_tokens(msgspec.Raw(json.dumps(tokens.tolist(), separators=separators).encode()))
    assert np.array_equal(alone, tokens)
    assert (found.dtype, echoed.dtype, alone.dtype) == (np.float32, np.int32, np.int32)


def test_null_and_exponents() -> None:
    found, tokens = read_logprobs(msgspec.Raw(b"[[null,5,null],[-1e-07,6,null],[0,7,null]]"))
    assert np.isnan(found[0]) and found[1:].tolist() == [np.float32(-1e-7), 0.0]
    assert tokens.tolist() == [5, 6, 7]


def test_texts_beside_the_tokens() -> None:
    found, tokens = read_logprobs(msgspec.Raw(b'[[-1.5,5,"a"],[-2.5,6,"b,c"]]'))
    assert (found.tolist(), tokens.tolist()) == ([-1.5, -2.5], [5, 6])


@pytest.mark.parametrize(
    "raw", [b"{}", b"5", b'",x"', b'"a,b"', b"[[1]]", b'[["x",5,null]]', b"[[0.5,1.5,null]]"]
)
def test_what_is_no_such_array_is_refused(raw: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        read_logprobs(msgspec.Raw(raw))
    with pytest.raises(msgspec.MsgspecError):
        read_tokens(msgspec.Raw(raw))
