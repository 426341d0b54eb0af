"""The stepping loop: every kind of run is this, over its own sources."""

from __future__ import annotations

from collections.abc import AsyncIterable

from agpo_megatron.controller.run import Batch, Run


async def train(run: Run, *sources: AsyncIterable[Batch]) -> None:
    """Take the optimizer steps of every batch of every source, one source after the other."""
    for source in sources:
        async for batch in source:
            await run.advance(batch)
