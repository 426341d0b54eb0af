"""The producer and the live source of batches: a real journal and window, scripted servers, rewards and trainer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made
import numpy as np
import pytest

from agpo_megatron.config import load_config
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.controller import live as live_module
from agpo_megatron.controller import producer as producer_module
from agpo_megatron.controller.evaluation import Rollouts
from agpo_megatron.controller.live import live, window_of
from agpo_megatron.controller.producer import producing
from agpo_megatron.controller.run import Batch, Recipe, Run
from agpo_megatron.journal import Journal, JournalReader
from agpo_megatron.observe.metrics import MetricsWriter
from agpo_megatron.observe.progress import Progress
from agpo_megatron.reward import Problem
from agpo_megatron.rollout.client import NonFiniteLogprob
from agpo_megatron.rollout.group_rollout import Counts, RolloutError
from agpo_megatron.samples import Fragment, Group, Prompt, VersionSpan, WeightVersion

SIZE, GROUP, LENGTH, CUT = 3, 2, 6, 2
"""A response has LENGTH tokens, in fragments of CUT."""


def token(position: int, index: int, place: int) -> int:
    return 10 + (7 * position + 3 * index + place) % 50


@dataclass
class ScriptedPool:
    """Generates groups whose samples depend on their position alone: even ones are mixed, odd ones all wrong. ``order``
    decides which of several finishes first. ``hold``: positions that stop after their first fragments."""

    order: random.Random
    version: str = "0.1.a"
    hold: set[int] = field(default_factory=set)
    broken: dict[int, Exception] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    drained: int = 0

    def __post_init__(self) -> None:
        self.open = True
        self.counts = Counts()
        self.servers: list[Any] = [SimpleNamespace()]
        self.slots = SimpleNamespace(limit=8, take_usage=lambda: (0.0, 0.0))

    async def generate_group(
        self, prompt: Prompt, known: Sequence[Fragment], keep: Callable[[Fragment], None]
    ) -> Group:
        position = prompt.position
        self.asked.append(position)
        have = {i: [f for f in known if f.index == i] for i in range(GROUP)}
        for start in range(0, LENGTH, CUT):
            for _ in range(self.order.randrange(4)):
                await asyncio.sleep(0)
            if position in self.broken:
                raise self.broken[position]
            for index in range(GROUP):
                if start < sum(len(f.tokens) for f in have[index]):
                    continue
                fragment = self.fragment(position, index, start)
                have[index].append(fragment)
                keep(fragment)
            if position in self.hold:
                await asyncio.Event().wait()
        samples = []
        for index in range(GROUP):
            spans = [s for f in have[index] for s in f.versions]
            samples.append(
                made.sample(
                    prompt,
                    index,
                    LENGTH,
                    response_tokens=np.concatenate([f.tokens for f in have[index]]),
                    rollout_logprobs=np.concatenate([f.logprobs for f in have[index]]),
                    versions=tuple(spans),
                )
            )
        return Group(prompt, samples)

    def fragment(self, position: int, index: int, start: int) -> Fragment:
        tokens = [token(position, index, place) for place in range(start, start + CUT)]
        return Fragment(
            position,
            index,
            start,
            np.array(tokens, np.int32),
            np.full(CUT, -0.5, np.float32),
            (VersionSpan(self.version, start, start + CUT),),
            "stop" if start + CUT == LENGTH else "",
        )

    async def close_dispatch(self) -> None:
        self.open = False

    async def open_dispatch(self) -> None:
        self.open = True

    async def drain(self, servers: Sequence[Any], seconds: float) -> None:
        assert not self.open
        self.drained += 1


async def mixed_if_even(group: Group, problem: Problem, source: int) -> Group:
    even = group.prompt.position % 2 == 0
    samples = [
        replace(s, raw_reward=float(even and s.index == 0), correct=even and s.index == 0)
        for s in group.samples
    ]
    return Group(group.prompt, samples)


def rollouts_of(pool: ScriptedPool, score: Any = mixed_if_even) -> Rollouts:
    rewards: Any = SimpleNamespace(
        score_group=score, pool=SimpleNamespace(take_busy_seconds=lambda: 0.5)
    )
    stream: Any = SimpleNamespace(
        prompt_at=lambda p: made.prompt(p, [1, 2, 3 + p % 5], str(p)),
        problem_at=lambda p: (0, Problem([], str(p))),
    )
    return Rollouts(pool, rewards, stream, [])  # type: ignore[arg-type]


def run_in(folder: Path, *overrides: str) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "c.yaml"
    path.write_text("model: {path: m}\ndata: {path: d}\n")
    sets = [f"train.prompts_per_batch={SIZE}", "train.steps=4", "algorithm.preset=grpo"]
    config = load_config(path, [*sets, *overrides], str(folder))
    with Progress(4, "test") as progress:
        return Run(
            config,
            RunFolder(folder),
            Journal(folder / "journal"),
            SimpleNamespace(),  # type: ignore[arg-type]
            MetricsWriter(folder, tensorboard=False),
            progress,
            Recipe(1.0, 0, config.train.steps),
            64,
        )


def trained(
    folder: Path,
    pool: ScriptedPool,
    monkeypatch: pytest.MonkeyPatch,
    *overrides: str,
    most: int = 99,
) -> list[Batch]:
    """Run ``live`` over a trainer that only counts its steps; ``most``: batches after which it is left."""
    run = run_in(folder, "algorithm.loss.correction.kind=none", *overrides)
    run.backend = "gloo"
    monkeypatch.setattr(live_module, "make_publisher", lambda *_: None)

    async def publish(run: Run, publisher: Any, timings: dict[str, float]) -> None:
        pool.version = str(run.version)
        await asyncio.sleep(0)

    monkeypatch.setattr(live_module, "publish", publish)
    found: list[Batch] = []

    async def body() -> None:
        source = live(run, rollouts_of(pool))
        async for batch in source:
            found.append(batch)
            for _ in range(pool.order.randrange(30)):  # the trainer's time
                await asyncio.sleep(0)
            run.version = WeightVersion(batch.record.steps[-1], 1, "x")
            if len(found) == most:
                break
        await source.aclose()

    asyncio.run(body())
    return found


def batch_files(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "journal/batches").glob("batch-*"))]


@pytest.fixture(autouse=True)
def quick_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred runs: without waiting for the disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.parametrize("preset", ["grpo", "dapo"])
def test_records_do_not_depend_on_the_order_of_completion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    """A hundred orders (fifty a preset), all samples of one version: records equal byte for byte, but for the place of
    samples in segments, which follow completion."""
    seen = set()
    for seed in range(50):
        pool = ScriptedPool(random.Random(seed))
        folder = tmp_path / str(seed)
        sets = [f"algorithm.preset={preset}", "train.max_staleness=2"]
        batches = trained(folder, pool, monkeypatch, *sets)
        reader = JournalReader(folder / "journal")
        content = []
        for batch in batches:
            record = batch.record
            samples = reader.samples(record.samples)
            assert [s.sample_id for s in samples] == record.sample_ids
            # The ages of samples depend on time; everything else does not.
            metrics = {n: v for n, v in record.metrics.items() if "staleness" not in n}
            columns = {n: c.tobytes() for n, c in record.columns.items() if n != "staleness"}
            tokens = [s.response_tokens.tobytes() for s in samples]
            content.append(
                (record.cursor, record.sample_ids, str(metrics), str(columns), str(tokens))
            )
            assert max(record.columns["staleness"]) <= 2 + (preset == "dapo")
        seen.add(str(content))
    assert len(seen) == 1


def test_staleness_0_takes_the_prompts_in_order_and_nothing_is_begun_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = ScriptedPool(random.Random(1))
    batches = trained(tmp_path, pool, monkeypatch)
    ids = [f"g{p:09d}.{i}" for p in range(4 * SIZE) for i in range(GROUP)]
    assert [name for b in batches for name in b.record.sample_ids] == ids
    assert sorted(pool.asked) == list(range(4 * SIZE))
    assert all(b.record.columns["staleness"].max() == 0 for b in batches)
    assert [b.record.cursor for b in batches] == [3, 6, 9, 12]


def test_equal_samples_give_equal_records_at_any_staleness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, once every group was generated in one order and under one version."""
    files = []
    for staleness in (0, 3):
        pool = ScriptedPool(random.Random(0))
        folder = tmp_path / str(staleness)
        prepared = run_in(folder)

        async def body(prepared: Run = prepared, pool: ScriptedPool = pool) -> None:
            for position in range(4 * SIZE):
                prompt = made.prompt(position, [1, 2, 3 + position % 5], str(position))
                group = await pool.generate_group(prompt, (), lambda f: None)
                prepared.journal.append([await mixed_if_even(group, Problem([], ""), 0)])

        asyncio.run(body())
        again = ScriptedPool(random.Random(0))
        trained(folder, again, monkeypatch, f"train.max_staleness={staleness}")
        assert again.asked == [], "durable groups are not generated again"
        files.append(batch_files(folder))
    assert files[0] == files[1] and len(files[0]) == 4


def test_a_restart_takes_the_same_prompts_and_continues_fragments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producer_module, "FRAGMENT_SECONDS", 0.05)
    run = run_in(tmp_path, "train.max_staleness=1")
    first = ScriptedPool(random.Random(3), hold={1, 4})

    async def killed() -> None:
        """Ends as a kill does: nothing is drained or flushed after the periodic files."""
        window = window_of(run.config, 0, 0)
        async with producing(run.config, run.journal, rollouts_of(first), window) as producer:
            producer.admit()
            while (
                len(list((tmp_path / "journal/fragments").glob("*.arrow"))) < 1 or window.open > 2
            ):
                await asyncio.sleep(0.01)
            monkeypatch.setattr(producer, "end", nothing)

    async def nothing(writer: asyncio.Task[None]) -> None:
        writer.cancel()

    asyncio.run(killed())
    kept = JournalReader(tmp_path / "journal").fragments()
    pieces = [f for some in kept.values() for f in some]
    assert {f.position for f in pieces} == {1, 4}

    second = ScriptedPool(random.Random(4), version="7.7.b")
    batches = trained(tmp_path, second, monkeypatch, "train.max_staleness=1")
    assert not {0, 2, 3, 5} & set(second.asked), "they were durable"
    samples = JournalReader(tmp_path / "journal").samples(
        [block for batch in batches for block in batch.record.samples]
    )
    by_id = {s.sample_id: s for s in samples}
    for piece in pieces:
        final = by_id[f"g{piece.position:09d}.{piece.index}"]
        assert final.response_tokens[piece.start : piece.end].tolist() == piece.tokens.tolist()
        assert [s.version.split(".")[0] for s in final.versions] == ["0", "0", "0"]
        assert final.versions[0].end == CUT == piece.end
    assert not list((tmp_path / "journal/fragments").iterdir()), "their groups are complete"


def test_leaving_keeps_what_runs(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    pool = ScriptedPool(random.Random(5), hold={0, 1})

    async def body() -> None:
        window = window_of(run.config, 0, 0)
        async with producing(run.config, run.journal, rollouts_of(pool), window) as producer:
            producer.admit()
            for _ in range(50):
                await asyncio.sleep(0)

    asyncio.run(body())
    assert pool.drained == 1
    assert pool.open, "the evaluation at the end needs the servers"
    reader = JournalReader(tmp_path / "journal")
    fragments = [f for some in reader.fragments().values() for f in some]
    assert sorted((f.position, f.index) for f in fragments) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    whole = [g.group.prompt.position for s in reader.segments() for g in reader.groups(s)]
    assert whole == [2]


def test_one_group_that_keeps_failing_is_set_aside_and_several_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = ScriptedPool(random.Random(6), broken={4: RolloutError("group 4 will not")})
    batches = trained(tmp_path / "one", pool, monkeypatch)
    positions = [int(name[1:10]) for b in batches for name in b.record.sample_ids[::GROUP]]
    assert positions == [0, 1, 2, 3, *range(5, 4 * SIZE + 1)]
    assert "group g000000004 is set aside (1 of " in caplog.text
    assert "group 4 will not" in caplog.text

    broken = {p: RolloutError(f"group {p} will not") for p in (4, 7)}
    pool = ScriptedPool(random.Random(6), broken=dict(broken))
    with pytest.raises(RolloutError, match="group 7 will not|group 4 will not"):
        trained(tmp_path / "two", pool, monkeypatch)

    nan = NonFiniteLogprob("http://s", 0, None, "1.1.a")
    with pytest.raises(NonFiniteLogprob):
        trained(tmp_path / "nan", ScriptedPool(random.Random(6), broken={4: nan}), monkeypatch)


def test_what_ends_the_rewards_reaches_the_consumer(tmp_path: Path) -> None:
    run = run_in(tmp_path)

    async def refuse(group: Group, problem: Problem, source: int) -> Group:
        raise ValueError("no verdicts today")

    async def body() -> None:
        window = window_of(run.config, 0, 0)
        rollouts = rollouts_of(ScriptedPool(random.Random(7)), refuse)
        async with producing(run.config, run.journal, rollouts, window) as producer:
            producer.admit()
            await producer.batch(lambda: asyncio.sleep(0))

    with pytest.raises(ValueError, match="no verdicts today"):
        asyncio.run(body())


def test_a_request_to_stop_ends_the_wait(tmp_path: Path) -> None:
    run = run_in(tmp_path)

    async def stop() -> None:
        raise KeyboardInterrupt

    async def body() -> None:
        window = window_of(run.config, 0, 0)
        rollouts = rollouts_of(ScriptedPool(random.Random(8), hold=set(range(9))))
        async with producing(run.config, run.journal, rollouts, window) as producer:
            producer.admit()
            with suppress(KeyboardInterrupt):
                async with asyncio.timeout(10):
                    await producer.batch(stop)

    asyncio.run(body())
    fragments = JournalReader(tmp_path / "journal").fragments()
    assert sum(len(some) for some in fragments.values()) == SIZE * GROUP


def test_a_batch_says_how_busy_the_servers_were_and_whether_short_answers_were_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in(tmp_path, "train.max_staleness=1")
    pool = ScriptedPool(random.Random(9))
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=100.0)
    monkeypatch.setattr(producer_module, "time", clock)

    async def of_length(prompt: Prompt, *_: object) -> Group:
        """Responses of 2, 3, 4, ... tokens by position."""
        return Group(prompt, [made.sample(prompt, i, 2 + prompt.position) for i in range(GROUP)])

    monkeypatch.setattr(pool, "generate_group", of_length)

    async def body() -> dict[str, float]:
        window = window_of(run.config, 0, 0)
        async with producing(run.config, run.journal, rollouts_of(pool), window) as producer:
            producer.admit()
            while window.open:
                await asyncio.sleep(0.001)
            clock.now, pool.counts.fragments, pool.counts.resumed = 110.0, 12, 5
            pool.counts.tokens_lost = 7
            pool.slots.take_usage = lambda: (20.0, 4.0)  # 10 s of one server of 8 slots
            return (await producer.batch(lambda: asyncio.sleep(0))).metrics

    assert asyncio.run(body()) == pytest.approx(
        {
            "rollout/slots_used_frac": 0.25,
            "idle/servers_frac": 0.6,
            "rollout/fragments": 12,
            "rollout/resumed": 5,
            "rollout/tokens_lost": 7,
            "window/ready_groups": 3,
            "window/open_groups": 0,
            "time/reward": 0.5,
            "busy/rewards_frac": 0.05,
            "throughput/servers_tokens_per_s": GROUP * (2 + 3 + 4 + 5 + 6 + 7) / 10,
            "rollout/length_bias": 3.0 / 4.5 - 1,  # 2, 3, 4 are taken, 5, 6, 7 wait
        }
    )
