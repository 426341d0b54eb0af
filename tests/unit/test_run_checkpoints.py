"""When a run saves and exports, what it keeps, and from what it continues: real journal, a trainer that only counts."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_stepping_loop import CountingTrainer, advance, batches, run_in

from agpo_megatron.config import ConfigError, load_config
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.controller import run as run_module
from agpo_megatron.controller.evaluation import write_scores
from agpo_megatron.controller.run import Run, StoppedOnRequest
from agpo_megatron.journal import JournalError
from agpo_megatron.observe.best import best_checkpoint, check_keep_best
from agpo_megatron.observe.metrics import read_metrics

EVERY = ("run.checkpoint_every=1", "run.keep_checkpoints=1")


def kept(folder: Path) -> list[int]:
    return [step for step, _ in RunFolder(folder).complete_checkpoints()]


@pytest.mark.parametrize(
    ("minutes", "saves"),
    [("0", [5, 10, 12]), ("2", [2, 4, 5, 7, 9, 10, 12]), ("3.5", [4, 5, 9, 10, 12])],
)
def test_minutes_count_from_the_last_save_of_either_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: str, saves: list[int]
) -> None:
    """A step takes a minute."""
    trainer = CountingTrainer()
    settings = [f"run.checkpoint_minutes={minutes}", "run.checkpoint_every=5"]
    monkeypatch.setattr(
        run_module,
        "time",
        SimpleNamespace(monotonic=lambda: 60.0 * trainer.held, time=time.time),
    )
    run = run_in(tmp_path, trainer, 12, *settings)
    run._last_save = 0.0
    advance(run, updates=1)
    assert trainer.saves == saves


def test_a_save_counts_when_its_files_are_written_and_only_then_replaces_the_one_before(
    tmp_path: Path,
) -> None:
    trainer, seen = CountingTrainer(), []
    trainer.polls = 2
    run = run_in(tmp_path, trainer, 7, "run.checkpoint_every=3", "run.keep_checkpoints=1")

    async def body() -> None:
        await run.load()
        async for batch in batches(run, 1):
            await run.advance(batch)
            seen.append((run.version.step, kept(tmp_path), trainer.saving is not None))

    asyncio.run(body())
    # A step asks twice: as it ends, and whether to stop.
    assert seen == [
        (1, [], False),
        (2, [], False),
        (3, [], True),
        (4, [3], False),
        (5, [3], False),
        (6, [3], True),
        (7, [7], False),
    ]
    assert trainer.saves == [3, 6, 7]


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    """The trainer refuses a save while one is under way."""
    trainer = CountingTrainer()
    trainer.polls = 1000
    advance(run_in(tmp_path, trainer, 4, "run.checkpoint_every=1"), updates=1)
    assert trainer.saves == [1, 2, 3, 4] and kept(tmp_path) == [3, 4]


def test_a_synchronous_save_is_complete_before_the_next_step(tmp_path: Path) -> None:
    trainer, seen = CountingTrainer(), []
    trainer.polls = 1000
    run = run_in(tmp_path, trainer, 3, "run.checkpoint_every=1", "run.async_save=false")

    async def body() -> None:
        await run.load()
        async for batch in batches(run, 1):
            await run.advance(batch)
            seen.append(kept(tmp_path))

    asyncio.run(body())
    assert seen == [[1], [1, 2], [2, 3]]


@pytest.mark.parametrize("held", [3, 4])
def test_a_stop_waits_for_the_save_under_way(tmp_path: Path, held: int) -> None:
    trainer = CountingTrainer()
    trainer.polls = 1000
    run = run_in(tmp_path, trainer, 8)
    run.stop_requested = lambda: trainer.held == held
    with pytest.raises(StoppedOnRequest, match=f"after step {held}, which is saved"):
        advance(run, updates=1)
    assert trainer.saves == sorted({3, held}) and kept(tmp_path) == trainer.saves


def test_the_best_is_kept_beside_the_newest_and_a_resumed_run_decides_the_same(
    tmp_path: Path,
) -> None:
    """Nothing of the journal is kept behind the best."""
    settings = [*EVERY, "run.keep_best=-loss/policy", "journal.keep=checkpoints"]
    trainer = CountingTrainer()
    trainer.losses = [0.5, 0.2, 0.3, 0.9]
    run = run_in(tmp_path, trainer, 8, *settings)
    run.stop_requested = lambda: trainer.held == 4
    with pytest.raises(StoppedOnRequest):
        advance(run, updates=1)
    assert kept(tmp_path) == [2, 4]
    assert [b.first_step for b in run.journal.reader.batches()] == [4]
    again = CountingTrainer()
    again.losses = [0.3, 0.2, 0.25, 0.1]
    again_run = run_in(tmp_path, again, 7, *settings)
    advance(again_run, updates=1)
    assert kept(tmp_path) == [6, 7], "as good as 2, and newer"
    advance(run_in(tmp_path, CountingTrainer(), 7, *settings), updates=1)
    assert kept(tmp_path) == [6, 7]


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("", None),
        ("lr", 4),
        ("eval/accuracy", 2),
        ("-eval/accuracy", 3),
        ("eval/second/accuracy", 4),
        ("eval/second/pass@4", None),
        ("-eval/tokens_mean", 3),
    ],
)
def test_the_best_is_decided_from_metrics_and_evaluations(
    tmp_path: Path, name: str, best: int | None
) -> None:
    """Of the checkpoints that are there and have the value; step 1 has been removed."""
    trainer = CountingTrainer()
    advance(
        run_in(tmp_path, trainer, 4, "run.checkpoint_every=1", "run.keep_checkpoints=3"), updates=1
    )
    folder = RunFolder(tmp_path)
    for step, first, second in ((1, 1.0, 1.0), (2, 0.5, 0.1), (3, 0.4, 0.2), (4, 0.45, 0.2)):
        one = {"accuracy": first, "tokens_mean": 20 * first, "tokens_correct_mean": 0.0}
        write_scores(folder, step, {"first": one, "second": {"accuracy": second}})
    assert kept(tmp_path) == [2, 3, 4]
    assert best_checkpoint(folder, name) == best


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("reward/acuracy", [], "no metric"),
        ("eval/acuracy", [], "has accuracy, pass@K"),
        ("eval/parts", [], "not 'parts'"),
        ("eval/accuracy", ["eval.sets=[]"], "eval.sets has no set"),
        ("eval/other/accuracy", [], "has no set 'other'"),
        ("eval/accuracy", ["eval.every=0"], "set eval.every"),
        ("eval/accuracy", [], ""),
        ("-eval/mine/tokens_mean", [], ""),
        ("-eval/mine/pass@8", [], ""),
        ("-loss/policy", [], ""),
        ("reward_part/format", [], ""),
    ],
)
def test_a_best_by_nothing_is_refused(
    tmp_path: Path, name: str, overrides: list[str], words: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {path: m}\ndata: {path: d}\neval: {every: 5, sets: [{path: e, name: mine}]}\n"
    )
    config = load_config(path, [f"run.keep_best={name}", *overrides])
    if words:
        with pytest.raises(ConfigError, match=words):
            check_keep_best(config)
    else:
        check_keep_best(config)


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = CountingTrainer()
    run = run_in(tmp_path, trainer, 8)
    run.stop_requested = lambda: trainer.held == 7
    with pytest.raises(StoppedOnRequest):
        advance(run, updates=2)
    assert kept(tmp_path) == [6, 7]
    again = CountingTrainer()
    again.damaged = {run.folder.checkpoint(7)}
    rest = run_in(tmp_path, again, 8)
    advance(rest, updates=2)
    assert [step for step, *_ in again.updates] == [7, 8]
    assert again.updates[0][1] == trainer.updates[-1][1], "the same committed batch"
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 9))
    assert kept(tmp_path) == [6, 8]
    aside = run.folder.checkpoints / "damaged-step-00000007"
    assert aside.is_dir() and not run.folder.checkpoint(7).exists()
    said = capsys.readouterr().err
    assert f"checkpoint {run.folder.checkpoint(7)} is damaged" in said
    assert f"kept as {aside}" in said and "from the checkpoint of step 6" in said


def test_damage_upon_damage_leads_back_to_the_initial_weights(tmp_path: Path) -> None:
    settings = ["run.checkpoint_every=1", "run.keep_checkpoints=3"]
    run = run_in(tmp_path, CountingTrainer(), 3, *settings)
    advance(run, updates=1)
    for _ in range(2):  # a name that is taken is not taken again
        again = CountingTrainer()
        again.damaged = {run.folder.checkpoint(step) for step in (1, 2, 3)}
        advance(run_in(tmp_path, again, 3, *settings), updates=1)
        assert [step for step, *_ in again.updates] == [1, 2, 3]
    names = sorted(p.name for p in run.folder.checkpoints.glob("damaged-*"))
    assert names == [f"damaged-step-0000000{n}{more}" for n in (1, 2, 3) for more in ("", ".2")]
    assert kept(tmp_path) == [1, 2, 3]


def test_damage_to_what_a_replay_begins_from_renames_nothing(tmp_path: Path) -> None:
    trainer, elsewhere = CountingTrainer(), tmp_path / "dump" / "checkpoints" / "step-00000003"
    elsewhere.mkdir(parents=True)
    trainer.damaged = {elsewhere}
    for _ in range(2):
        run = run_in(tmp_path, trainer, 4)
        with pytest.raises(JournalError, match="step-00000003 is the checkpoint that this replay"):
            asyncio.run(run.load(run.journal.reader, (3, elsewhere)))
    assert elsewhere.is_dir()


class Killed(BaseException):
    """The controller is gone."""


@pytest.mark.parametrize(
    ("steps", "killed_at", "export_every"), [(4, 4, 2), (7, 3, 3)], ids=["at the last", "between"]
)
def test_what_a_killed_controller_did_not_save_any_more_the_next_one_saves(
    tmp_path: Path, steps: int, killed_at: int, export_every: int
) -> None:
    """The trainer goes on living, and holds the step."""

    def run_with(trainer: CountingTrainer, folder: Path) -> Run:
        folder.mkdir(exist_ok=True)
        return run_in(folder, trainer, steps, f"run.export_every={export_every}")

    trainer, undisturbed = CountingTrainer(), CountingTrainer()
    killed = run_with(trainer, tmp_path / "killed")
    save = killed._save_what_is_due

    async def dies() -> None:
        if killed.version.step == killed_at:
            raise Killed
        await save()

    killed._save_what_is_due = dies  # type: ignore[method-assign]
    with pytest.raises(Killed):
        advance(killed, updates=1)
    advance(run_with(trainer, tmp_path / "killed"), updates=1)
    advance(run_with(undisturbed, tmp_path / "undisturbed"), updates=1)
    assert trainer.saves == undisturbed.saves and trainer.exports == undisturbed.exports
    assert killed_at in trainer.saves


def test_the_best_of_a_batch_is_known_by_its_first_step(tmp_path: Path) -> None:
    """Four updates a batch, and every checkpoint is at the last of them."""
    settings = ("run.checkpoint_every=4", "run.keep_best=reward/accuracy")
    run = run_in(tmp_path, CountingTrainer(), 12, *settings, "train.updates_per_batch=4")
    advance(run, updates=4)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "reward/accuracy" in row] == [1, 5, 9]
    assert kept(tmp_path) == [8, 12]
    assert best_checkpoint(run.folder, "reward/accuracy", 4) == 12
    assert best_checkpoint(run.folder, "reward/accuracy", 1) is None


def test_without_the_journal_in_between_damage_is_refused_and_nothing_renamed(
    tmp_path: Path,
) -> None:
    settings = [*EVERY, "run.keep_best=-loss/policy", "journal.keep=checkpoints"]
    trainer = CountingTrainer()
    trainer.losses = [0.1]
    run = run_in(tmp_path, trainer, 3, *settings)
    advance(run, updates=1)
    assert kept(tmp_path) == [1, 3]
    again = CountingTrainer()
    again.damaged = {run.folder.checkpoint(3)}
    words = r"step-00000003 is damaged.*cannot continue from the checkpoint of step 1.*no step 2"
    for _ in range(2):
        with pytest.raises(JournalError, match=words):
            advance(run_in(tmp_path, again, 4, *settings), updates=1)
    assert kept(tmp_path) == [1, 3] and again.updates == []


def test_exports_on_schedule_each_once_also_when_steps_are_replayed(tmp_path: Path) -> None:
    settings = ["run.export_every=2", "run.checkpoint_every=100"]
    trainer = CountingTrainer()
    run = run_in(tmp_path, trainer, 6, *settings)

    async def killed() -> None:
        await run.load()
        async for batch in batches(run, 1):
            await run.advance(batch)
            if run.version.step == 4:
                return

    asyncio.run(killed())
    assert trainer.exports == ["step-00000002", "step-00000004"]
    (run.folder.exports / "step-00000004").rmdir()  # the kill came before its end
    (run.folder.exports / ".step-00000004.partial-77").mkdir()
    (run.folder.exports / ".step-00000005.partial").mkdir()  # of the command line, at work
    again = CountingTrainer()
    advance(run_in(tmp_path, again, 6, *settings), updates=1)
    assert again.exports == ["step-00000004", "step-00000006"]
    assert sorted(p.name for p in run.folder.exports.iterdir()) == [
        ".step-00000005.partial",
        *(f"step-0000000{n}" for n in (2, 4, 6)),
    ]
