"""SGLang on a GPU: a server starts, generates, agrees with the policy on log-probs, and takes published weights, of
which some are read back with each publish.

The update group is NCCL's with two GPUs or more, gloo's where server and policy share one. Not yet run.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from one_rank import activate, built, sequences, train_sequence
from record import Record
from server import server, settings, write_model

PROMPT = [1, 5, 9, 7, 12, 6, 10]
GAP = 0.05
"""Nats, mean over generated tokens, both ends in bf16."""


class PolicyTrainer:
    """``sync.messages.TrainerPublishing`` over a policy in this process: one stage, whose source is this rank."""

    def __init__(self, policy: Any, plan: Any, device: str) -> None:
        from agpo_megatron.sync.source import WeightSource

        self.policy, self.plan, self.step = policy, plan, 1
        self.source = WeightSource(device, server_checksums=False)

    async def publish_open(
        self, epoch: str, world_size: int, seconds: float
    ) -> Mapping[int, tuple[str, int]]:
        from agpo_megatron.sync.messages import group_name

        port = self.source.open("127.0.0.1", group_name(epoch, 0), world_size, seconds)
        return {0: ("127.0.0.1", port)}

    async def publish_send(self, version: Any, seconds: float, excerpts: Mapping[str, int]) -> Any:
        from agpo_megatron.sync.messages import PublishReport
        from agpo_megatron.sync.source import bucketed

        buckets = bucketed(self.policy.named_hf_tensors(), self.plan[0])
        report = await asyncio.to_thread(self.source.broadcast, buckets, seconds, excerpts)
        return PublishReport(self.step, {0: report})

    async def score_tokens(self, tokens: list[int], seconds: float) -> tuple[int, list[float]]:
        return self.step, self.scored(tokens, 1.0)

    def scored(self, tokens: list[int], temperature: float) -> list[float]:
        sequence = train_sequence("probe", tokens, 1, {"loss_weight": 1.0})
        scores = self.policy.score([[sequence]], temperature=temperature)
        return [float(x) for x in scores["probe"].logprobs[1:]]


async def published(
    record: Record,
    url: str,
    trainer: PolicyTrainer,
    config: Any,
    backend: str,
    readable: Mapping[str, int],
) -> None:
    import aiohttp
    import numpy as np

    from agpo_megatron.algorithm.settings import LossSettings
    from agpo_megatron.rollout.client import ServerClient
    from agpo_megatron.rollout.pool import RolloutPool
    from agpo_megatron.samples import Prompt, WeightVersion
    from agpo_megatron.sync.protocol import Publisher

    prompt = Prompt(0, np.array(PROMPT, dtype=np.int32), "")
    async with aiohttp.ClientSession() as session:
        client = ServerClient(url, session, timeout=60)
        pool = RolloutPool([client], config.rollout)
        publisher = Publisher(
            pool,
            trainer,
            trainer.plan,
            server_ranks=1,
            backend=backend,
            probe_tokens=PROMPT,
            probe_tolerance=0.5,
            timeout=120,
            readable=readable,
        )
        async with pool:
            await pool.wait_alive(seconds=60)
            sums = []
            for step in (1, 2):
                trainer.step = step
                done = await publisher.publish(WeightVersion(step, 1))
                sums.append(await client.checksums(30))
                record.figure(f"publish {step}", sum(done.seconds.values()), "s")
                record.close(f"publish {step}: log-probs of fixed tokens", done.probe_diff_max, 0.5)
                (sample,) = (await pool.sample(prompt)).samples
                tokens = PROMPT + sample.response_tokens.tolist()
                mine = trainer.scored(tokens, 1.0)[len(PROMPT) - 1 :]
                gaps = [abs(a - b) for a, b in zip(mine, sample.rollout_logprobs, strict=True)]
                record.close(f"publish {step}: generated tokens", sum(gaps) / len(gaps), GAP)
                trainer.policy.update(
                    [sequences([40, 23], 18)], loss=LossSettings(policy="nll"), lr=1e-3
                )
            record.check("checksums change with the weights", sums[0] != sums[1])


def run(record: Record, device: str, gpus: int) -> None:
    """All of it; ``device`` cpu is for the tests of this stage."""
    engine = device == "cuda" and importlib.util.find_spec("transformer_engine")
    activate(device, "auto" if engine else "local")
    from agpo_megatron.config.schema import TrainConfig
    from agpo_megatron.conversion.hf_checkpoint import read_config
    from agpo_megatron.conversion.manifest import buckets, publish_manifest
    from agpo_megatron.rollout.excerpts import readable_rows

    record.skip("layers", "Transformer Engine's" if engine else "local: no Transformer Engine")
    backend = "nccl" if gpus > 1 else "gloo"
    record.skip("update group", f"over {backend}, {gpus} GPU(s)")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model)
        config = settings(model, gpus, device)
        manifest = publish_manifest(read_config(model), [list(range(4))], "bfloat16")
        plan = [buckets(stage, 8 << 20) for stage in manifest]
        with server(config, int(gpus > 1), Path(folder) / "server.log") as live:
            record.figure("server: seconds to the first generation", live.start_seconds, "s")
            with built(model, config.policy, TrainConfig()) as policy:
                trainer = PolicyTrainer(policy, plan, "cuda" if gpus > 1 else "cpu")
                shapes = {spec.name: spec.shape for bucket in plan[0] for spec in bucket}
                readable = readable_rows(read_config(model), shapes, ranks=1)
                record.figure("tensors that may be read back", len(readable), "")
                asyncio.run(published(record, live.url, trainer, config, backend, readable))
                trainer.source.close()


def main() -> None:
    import torch

    run(Record(Path(sys.argv[2])), sys.argv[1], torch.cuda.device_count())


if __name__ == "__main__":
    main()
