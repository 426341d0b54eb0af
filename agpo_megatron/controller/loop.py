"""The training loop, the same for every kind of run; only the sources of batches differ."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from agpo_megatron.controller.batch import Batch
from agpo_megatron.controller.run import Run


async def train(run: Run, *sources: AsyncGenerator[Batch, None]) -> None:
    """Take the optimizer steps of every batch of every source, one source after the other."""
    for source in sources:
        async with aclosing(source):
            async for batch in source:
                await run.advance(batch)
