"""The long arrays of numbers in a server's JSON, read as columns: no Python object per token.

SGLang writes JSON without blanks, so the texts of the numbers lie between commas and one cast of Arrow parses them all
(131,072 tokens with their log-probs in 14 ms, of which a third finds the commas). Anything else, blanks or a null
among the log-probs, takes the ordinary decoder, with the same result.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pyarrow as pa

from agpo_megatron.samples import Array, Floats, Ints


class _Entry(msgspec.Struct, array_like=True, gc=False):
    """Log-prob and token of one place of a response. JSON has no NaN: the server writes null."""

    logprob: float | None
    token: int


_ENTRIES = msgspec.json.Decoder(list[_Entry])
_TOKENS = msgspec.json.Decoder(list[int])


def read_tokens(raw: msgspec.Raw) -> Ints:
    """``[token, ...]``, [n] int32. Raises msgspec.MsgspecError."""
    data = np.frombuffer(raw, np.uint8)
    commas = _commas(data)
    try:
        if len(data) > 2:
            return _cast(data, np.append(1, commas + 1), np.append(commas, len(data) - 1), "int32")
    except ValueError:
        pass
    return np.array(_TOKENS.decode(raw), dtype=np.int32)


def read_logprobs(raw: msgspec.Raw) -> tuple[Floats, Ints]:
    """``[[log-prob, token, null], ...]`` as log-probs [n] float32, NaN for null, and tokens [n] int32. Raises
    msgspec.MsgspecError."""
    data = np.frombuffer(raw, np.uint8)
    commas = _commas(data)
    first, second, between = commas[0::3], commas[1::3], commas[2::3]
    try:
        if len(second) == len(between) + 1:
            starts = np.append(2, between + 2)
            return _cast(data, starts, first, "float32"), _cast(data, first + 1, second, "int32")
    except ValueError:
        pass
    entries = _ENTRIES.decode(raw)
    logprobs = [math.nan if e.logprob is None else e.logprob for e in entries]
    return np.array(logprobs, np.float32), np.array([e.token for e in entries], np.int32)


def _commas(data: Array) -> Array:
    return np.flatnonzero(data == ord(",")).astype(np.int32)


def _cast(data: Array, starts: Array, ends: Array, dtype: str) -> Array:
    """The numbers whose texts are ``data[starts[i] : ends[i]]``. Raises ValueError when one is not a number.

    The texts are every other entry of an Arrow array over ``data``; what lies between them is marked as missing.
    """
    count = len(starts)
    places = np.empty(2 * count + 1, dtype=np.int32)
    places[0:-1:2], places[1::2], places[-1] = starts, ends, len(data)
    if np.any(places[1:] < places[:-1]):
        raise ValueError("not an array of numbers")
    known = np.full(count // 4 + 1, 0b01010101, dtype=np.uint8)
    buffers = [pa.py_buffer(known), pa.py_buffer(places), pa.py_buffer(data)]
    texts = pa.Array.from_buffers(pa.string(), 2 * count, buffers)
    numbers = texts.cast(pa.from_numpy_dtype(np.dtype(dtype)))
    return np.frombuffer(numbers.buffers()[1], dtype, 2 * count)[::2].copy()
