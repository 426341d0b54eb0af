"""Stop texts across the border of two requests: a server looks for them in the tokens of one request only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from agpo_megatron.samples import Ints


def stop_across_border(
    before: Ints, after: Ints, stop: Sequence[str], decode: Callable[[Ints], str]
) -> int | None:
    """Return after how many tokens of ``after`` [m] a text of ``stop`` is complete that began in ``before`` [n];
    None if there is none. ``decode`` must keep special tokens."""
    if not stop or not len(before):
        return None
    reach = max(len(text.encode()) for text in stop)  # a token has at least one byte
    tail = before[-reach:]
    for count in range(1, min(reach, len(after)) + 1):
        text = decode(np.concatenate([tail, after[:count]]))
        if any(wanted in text for wanted in stop):
            return count
    return None
