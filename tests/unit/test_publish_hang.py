"""A server that does not answer in the middle of a publish is ended; one that answers with an error is not."""

from __future__ import annotations

import asyncio
import time

from agpo_megatron.config.schema import RolloutConfig
from agpo_megatron.rollout.client import ServerClient
from agpo_megatron.rollout.pool import RolloutPool
from agpo_megatron.rollout.servers import State
from agpo_megatron.samples import WeightVersion
from agpo_megatron.sync.transfer import Transfer


def test_only_silence_ends_a_server() -> None:
    async def publish() -> None:
        clients = [ServerClient(f"http://127.0.0.1:{i}", None, 1.0) for i in (1, 2, 3)]  # type: ignore[arg-type]
        pool = RolloutPool(clients, RolloutConfig())
        ended: list[int] = []
        pool.end_hung = ended.append
        run = Transfer(pool, list(pool.servers), WeightVersion(1, 1), time.monotonic() + 9)
        await run.fail(pool.servers[0], "status 500")
        await run.fail(pool.servers[2], "no answer", dead=True)
        assert ended == [2]
        states = [server.state for server in pool.servers]
        assert states == [State.QUARANTINED, State.STARTING, State.DEAD]
        pool.end_hung = None  # on a CPU gloo frees it, and it comes back by itself
        await run.fail(pool.servers[1], "no answer", dead=True)
        assert pool.servers[1].state is State.DEAD

    asyncio.run(publish())
