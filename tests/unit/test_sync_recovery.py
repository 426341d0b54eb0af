"""A publish that loses its only server takes it back: the server's probe must not wait for the publish's own turn."""

from __future__ import annotations

import asyncio

import pytest
from test_sync_protocol import publishing

from agpo_megatron.rollout.pool import PROBE_SECONDS
from agpo_megatron.samples import WeightVersion

pytestmark = pytest.mark.processes


def test_a_connection_that_breaks_in_a_publish_costs_seconds_not_the_run() -> None:
    async def run() -> None:
        async with publishing(1, timeout=20, refresh=True) as (publisher, _, (fake,), trainer):
            trainer.step = 1
            await publisher.publish(WeightVersion(1, 1))
            await asyncio.sleep(2 * PROBE_SECONDS + 0.2)  # the probe is at rest, and wakes at once
            fake.stall["pause_generation"] = asyncio.Event()
            fake.drop.append("pause_generation")
            trainer.step = 2
            publish = asyncio.create_task(publisher.publish(WeightVersion(2, 1)))
            while fake.controls[-1][0] != "pause_generation":
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)  # the server is quarantined: its probe sets out to refresh it
            fake.stall.pop("pause_generation").set()
            publication = await asyncio.wait_for(publish, 10)
            assert publication.version.step == 2
            assert fake.version.startswith("2.1.")

    asyncio.run(run())
