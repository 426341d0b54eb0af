"""The stepping loop over its sources: real journal, a trainer that only counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made
import numpy as np
import pytest
from test_algorithm_step import group, step

from agpo_megatron.cluster.start_folder import committed_steps
from agpo_megatron.config import load_config
from agpo_megatron.config.run_folder import CHECKPOINT_MARKER, RunFolder
from agpo_megatron.config.schema import SftConfig
from agpo_megatron.controller.live import publish
from agpo_megatron.controller.loop import train
from agpo_megatron.controller.run import Batch, Recipe, Run, StoppedOnRequest
from agpo_megatron.controller.sources import recorded, worked_examples
from agpo_megatron.conversion.shape import ModelShape
from agpo_megatron.journal import Journal, JournalError
from agpo_megatron.observe.flops import training_flops
from agpo_megatron.observe.metrics import MetricsWriter, read_metrics
from agpo_megatron.observe.progress import Progress
from agpo_megatron.parity.models import MIXTRAL
from agpo_megatron.samples import Group, WeightVersion
from agpo_megatron.sync.protocol import Publication


class CountingTrainer:
    """Refuses steps out of order, and a save while one is under way; a checkpoint is a folder with the marker."""

    def __init__(self) -> None:
        self.held, self.updates, self.saves = 0, [], []  # type: ignore[var-annotated]
        self.norms: list[float] = []  # of the next updates; then 1
        self.losses: list[float] = []  # of the next updates; then 0.5
        self.polls = 0  # that find a save still under way
        self.saving: Path | None = None
        self.asked = 0
        self.damaged: set[Path] = set()
        self.exports: list[str] = []
        self.answer: list[dict[str, float]] = []  # what the next updates say besides

    async def call(self, name: str, **args: Any) -> list[dict[str, Any]]:
        if name == "load":
            damaged = args["checkpoint"] and Path(args["checkpoint"]) in self.damaged
            self.held = max(self.held, 0 if damaged else args["step"])
            return [
                {
                    "backend": "gloo",
                    "step": self.held,
                    "damaged": f"checkpoint {args['checkpoint']} is damaged" if damaged else "",
                    "last_update": {"loss/policy": 0.5, "grad_norm": 1.0},
                }
            ]
        if name == "update":
            assert args["step"] == self.held + 1
            self.held = args["step"]
            rows = sorted(row for rank in args["plan"] for some in rank for row in some)
            self.updates.append((args["step"], args["record"], rows, args["lr"]))
            loss = self.losses.pop(0) if self.losses else 0.5
            norm = self.norms.pop(0) if self.norms else 1.0
            said = self.answer.pop(0) if self.answer else {}
            return [{"loss/policy": loss, "grad_norm": norm, **said}]
        if name == "save":
            assert self.saving is None
            self.saves.append(args["step"])
            self.saving, self.asked = Path(args["path"]), 0
            return self.complete() if args["wait"] else [{"done": False, "held": 0.0}]
        if name == "save_done":
            assert self.saving is not None
            self.asked += 1
            wait = args["wait"] or self.asked > self.polls
            return self.complete() if wait else [{"done": False}]
        if name == "export":
            self.exports.append(Path(args["path"]).name)
            Path(args["path"]).mkdir(parents=True)
            return [{}]
        return [{"loss/policy": 0.5, "grad_norm": 1.0}]

    def complete(self) -> list[dict[str, Any]]:
        assert self.saving is not None
        self.saving.mkdir(parents=True)
        (self.saving / CHECKPOINT_MARKER).touch()
        self.saving = None
        return [{"done": True, "seconds": 0.0, "bytes": 1}]


def run_in(folder: Path, trainer: CountingTrainer, steps: int, *overrides: str) -> Run:
    path = folder / "c.yaml"
    path.write_text("model: {path: m}\ndata: {path: d}\n")
    config = load_config(path, ["run.checkpoint_every=3", *overrides], str(folder))
    with Progress(steps, "test") as progress:
        return Run(
            config,
            RunFolder(folder),
            Journal(folder / "journal"),
            trainer,  # type: ignore[arg-type]
            MetricsWriter(folder, tensorboard=False),
            progress,
            Recipe(1.0, 0, steps),
            64,
        )


async def batches(run: Run, updates: int) -> AsyncGenerator[Batch, None]:
    """Groups of two samples, four to a batch, decided and committed as live ones are."""
    while run.version.step < run.recipe.steps:
        first = run.version.step // updates * 4
        groups = [group(p, [1, 0], [3, 4]) for p in range(first, first + 4)]
        journaled = run.journal.append(groups)
        decision = step(groups, "grpo", updates=updates, first_step=run.version.step + 1)
        yield await run.commit(
            journaled, decision, updates=updates, cursor=first + 4, timings={"time/step": 1.0}
        )


def advance(run: Run, updates: int) -> None:
    async def body() -> None:
        await run.load()
        await train(run, recorded(run, run.journal.reader), batches(run, updates))

    asyncio.run(body())


def test_every_update_of_a_batch_is_a_step_on_its_own_part(tmp_path: Path) -> None:
    trainer = CountingTrainer()
    run = run_in(tmp_path, trainer, 8)
    advance(run, updates=4)
    assert [step for step, *_ in trainer.updates] == list(range(1, 9))
    assert len({record for _, record, *_ in trainer.updates}) == 2
    for first in (0, 4):
        parts = [rows for _, _, rows, _ in trainer.updates[first : first + 4]]
        assert all(len(part) == 2 for part in parts)
        assert sorted(row for part in parts for row in part) == list(range(8))
    assert trainer.saves == [3, 6, 8]
    rows = read_metrics(tmp_path)
    assert ["reward/mean" in row for row in rows] == [True, False, False, False] * 2
    assert ["throughput/tokens_per_s" in row for row in rows] == [False, False, False, True] * 2
    whole = sum(row["time/step"] for row in rows[:4])
    assert rows[3]["throughput/tokens_per_s"] == pytest.approx(4 * (5 + 6) / whole)


def test_no_throughput_is_said_of_a_batch_that_another_start_generated(tmp_path: Path) -> None:
    trainer = CountingTrainer()
    run = run_in(tmp_path, trainer, 4)
    run.stop_requested = lambda: trainer.held == 2
    with pytest.raises(StoppedOnRequest):
        advance(run, updates=4)
    advance(run_in(tmp_path, trainer, 4), updates=4)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert not any("throughput/tokens_per_s" in row for row in read_metrics(tmp_path))
    assert all("time/step" in row for row in read_metrics(tmp_path))


def test_tokens_and_flops_are_those_of_the_sequences_that_are_packed(tmp_path: Path) -> None:
    """Of two groups one has no variance, so no weight; the last update computes nothing."""
    trainer = CountingTrainer()
    trainer.answer = [{"tokens/trained": 7.0}, {"tokens/trained": 0.0}]
    run = run_in(tmp_path, trainer, 2, "observe.peak_tflops=2e-6", "policy.data_parallel=2")
    run.shape = ModelShape.from_hf(MIXTRAL)

    async def source() -> AsyncGenerator[Batch, None]:
        for first in (0, 2):
            groups = [group(first, [1, 0], [3, 4]), group(first + 1, [1, 1], [50, 60])]
            decision = step(groups, "grpo", first_step=run.version.step + 1)
            timings = {"time/step": 1.0, "time/score": 0.25}
            yield await run.commit(
                run.journal.append(groups), decision, updates=1, cursor=first + 2, timings=timings
            )

    async def body() -> None:
        await run.load()
        await train(run, source())

    asyncio.run(body())
    first, second = read_metrics(tmp_path)
    packed = [5, 6]  # prompts of two tokens
    assert first["throughput/trainer_tokens_per_s"] == sum(packed) / first["time/update"]
    flops = training_flops(run.shape, packed, 3 + 4)
    peak = 2 * 2e6 * first["time/update"]  # two devices
    assert first["throughput/mfu"] == pytest.approx(flops / peak)
    busy = (0.25 + first["time/update"]) / first["time/step"]
    assert first["busy/trainer_frac"] == pytest.approx(busy)
    assert not {"throughput/mfu", "throughput/trainer_tokens_per_s"} & set(second)


@pytest.mark.parametrize("survives", [False, True], ids=["trainer-lost", "trainer-survived"])
def test_a_stop_in_the_middle_of_a_batch_is_saved_and_continued(
    tmp_path: Path, survives: bool
) -> None:
    trainer = CountingTrainer()
    run = run_in(tmp_path, trainer, 8)
    run.stop_requested = lambda: trainer.held == 6
    with pytest.raises(StoppedOnRequest, match="after step 6, which is saved"):
        advance(run, updates=4)
    assert trainer.saves[-1] == 6
    assert committed_steps(RunFolder(tmp_path)) == 6
    again = trainer if survives else CountingTrainer()
    rest = run_in(tmp_path, again, 8)
    advance(rest, updates=4)
    done = trainer.updates + (again.updates if not survives else [])
    assert [step for step, *_ in done] == list(range(1, 9))
    assert done[6][1] == done[5][1], "the same committed batch"
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 9))
    assert len(rest.journal.reader.batches()) == 2


@pytest.mark.parametrize(
    ("held", "saves", "said"),
    [(0, [], "before the first step"), (2, [2], "after step 2"), (3, [3], "after step 3")],
)
def test_a_stop_between_steps_saves_what_is_not_saved(
    tmp_path: Path, held: int, saves: list[int], said: str
) -> None:
    """Of three steps the last is saved on schedule; asked to end, the run saves no step twice."""
    trainer = CountingTrainer()
    run = run_in(tmp_path, trainer, 4)

    async def body() -> None:
        await run.load()
        source = batches(run, 1)
        for _ in range(held):
            await run.advance(await anext(source))
        await run.stop_if_asked()  # nobody has
        run.stop_requested = lambda: True
        await run.stop_if_asked()

    with pytest.raises(StoppedOnRequest, match=f"stopped {said}"):
        asyncio.run(body())
    assert trainer.saves == saves


def test_asked_to_end_at_its_last_step_a_run_is_done(tmp_path: Path) -> None:
    trainer = CountingTrainer()
    run = run_in(tmp_path, trainer, 4)
    run.stop_requested = lambda: trainer.held == 4
    advance(run, updates=2)
    assert trainer.saves == [3, 4] and run.version.step == 4


@pytest.mark.parametrize(
    ("norms", "lr", "moved"),
    [((0.0, 0.0), 1.0, False), ((0.5, 0.0), 1.0, True), ((0.5,), 0.0, False)],
)
def test_a_publish_knows_whether_a_step_had_a_gradient(
    tmp_path: Path, norms: tuple[float, ...], lr: float, moved: bool
) -> None:
    """Of all steps since the last publish; then counted anew."""
    trainer, given = CountingTrainer(), []
    run = run_in(tmp_path, trainer, len(norms))
    run.recipe = Recipe(lr, 0, len(norms))
    trainer.norms = list(norms)

    async def accept(version: WeightVersion, moved: bool) -> Publication:
        given.append(moved)
        return Publication(version, ["http://s"], 1, {}, 0.0)

    async def body() -> None:
        await run.load()
        publisher: Any = SimpleNamespace(publish=accept)
        await publish(run, publisher, {})
        async for batch in batches(run, len(norms)):
            await run.advance(batch)
        await publish(run, publisher, {})
        await publish(run, publisher, {})

    asyncio.run(body())
    assert given == [False, moved, False]


def test_waits_are_shares_of_the_whole_batch(tmp_path: Path) -> None:
    run = run_in(tmp_path, CountingTrainer(), 2)

    async def body() -> None:
        await run.load()
        batch = await anext(batches(run, 2))
        batch.timings.update({"time/step": 5.0, "time/rollout": 4.0, "time/publish": 1.0})
        await run.advance(batch)

    asyncio.run(body())
    first, last = read_metrics(tmp_path)
    assert not [key for key in first if key.startswith("idle/")]
    seconds = first["time/step"] + last["time/step"]
    assert seconds >= 5.0
    assert last["idle/trainer_frac"] == pytest.approx(4.0 / seconds)
    assert last["idle/publish_frac"] == pytest.approx(1.0 / seconds)


def test_a_result_that_reached_no_controller_is_reported_by_the_next(tmp_path: Path) -> None:
    trainer = CountingTrainer()
    run = run_in(tmp_path, trainer, 4)
    source = batches(run, 4)

    async def lost() -> None:
        await run.load()
        await run.update(await anext(source), 1)  # and the controller is gone

    asyncio.run(lost())
    advance(run_in(tmp_path, trainer, 4), updates=4)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_cold_start_obeys_stop_requests_and_resumes(tmp_path: Path) -> None:
    sft = SftConfig(base="b", path="p", steps=5, batch_size=3)
    examples = []
    for position in range(7):
        of = made.prompt(position)
        sample = made.sample(of, 0, 3, versions=(), rollout_logprobs=np.full(3, np.nan, np.float32))
        examples.append(Group(of, [sample]))

    def run_sft(trainer: CountingTrainer, stop_at: int) -> None:
        run = run_in(tmp_path, trainer, sft.steps)
        run.stop_requested = lambda: trainer.held == stop_at

        async def body() -> None:
            await run.load()
            source = worked_examples(run, examples, sft)
            await train(run, recorded(run, run.journal.reader), source)

        asyncio.run(body())

    first, second = CountingTrainer(), CountingTrainer()
    with pytest.raises(StoppedOnRequest):
        run_sft(first, 2)
    run_sft(second, 0)
    assert [s for s, *_ in first.updates + second.updates] == [1, 2, 3, 4, 5]
    journal = Journal(tmp_path / "journal")
    assert len(journal.reader.segments()) == 1, "examples are written once"
    assert all(len(rows) == 3 for _, _, rows, _ in second.updates)


def test_a_replay_that_lacks_a_step_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    trainer = CountingTrainer()
    run = run_in(tmp_path / "one", trainer, 4)
    advance(run, updates=4)
    replay = run_in(tmp_path / "two", CountingTrainer(), 6)

    async def body(last: int) -> None:
        await replay.load(run.journal.reader)
        await train(replay, recorded(replay, run.journal.reader, last=last))

    with pytest.raises(JournalError, match=r"has no step 5 \(it holds 1 to 4\)"):
        asyncio.run(body(6))
    replay.recipe = Recipe(1.0, 0, 2)
    asyncio.run(body(2))
    assert replay.version.step == 2, "a part of a batch, if no more is asked for"


def test_checkpoints_and_the_journal_behind_them_are_removed(tmp_path: Path) -> None:
    """A batch that is trained in part stays: its other steps are still to be trained."""
    trainer = CountingTrainer()
    keep = ["journal.keep=checkpoints", "run.keep_checkpoints=1", "run.checkpoint_every=1"]
    run = run_in(tmp_path, trainer, 12, *keep)
    run.stop_requested = lambda: trainer.held == 10
    with pytest.raises(StoppedOnRequest):
        advance(run, updates=4)
    assert [step for step, _ in run.folder.complete_checkpoints()] == [10]
    held = [(b.first_step, b.last_step) for b in run.journal.reader.batches()]
    assert held == [(9, 12)]
    assert [s.first for s in run.journal.reader.segments()] == [8]
    advance(run_in(tmp_path, CountingTrainer(), 12, *keep), updates=4)


def test_the_display_keeps_what_is_known_of_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(400, "test", updates=4) as progress:
        for number in range(1, 9):
            whole = {"reward/mean": 0.25, "reward/accuracy": 0.125} if number % 4 == 1 else {}
            progress.step({"step": float(number), "loss/policy": 0.5, **whole})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(lines) == 2 and all("accuracy 0.125" in line for line in lines)


def test_a_journal_of_an_earlier_release_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "owner-000001.json").write_text('{"segments": [], "steps": []}')
    with pytest.raises(JournalError, match="written by an earlier release"):
        Journal(tmp_path)
