"""Verdicts in the stepping loop, with a real journal: resumed from at every durable point, replayed, dumped."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from guarded_trainer import GuardedTrainer
from test_stepping_loop import batches, run_in

from agpo_megatron.config.loading import load_config
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.controller.guard_dump import dumped_step, replay_command
from agpo_megatron.controller.loop import train
from agpo_megatron.controller.run import Run
from agpo_megatron.controller.sources import recorded
from agpo_megatron.controller.watch import GuardStop
from agpo_megatron.journal import (
    GuardFinding,
    Journal,
    JournalError,
    JournalReader,
    StepVerdict,
)
from agpo_megatron.observe.metrics import read_metrics

SPIKES = {step: {"grad_norm": 1000.0} for step in (10, 11, 12, 13)}
STEPS = 14


class Killed(BaseException):
    """The controller is gone."""


def go(folder: Path, trainer: GuardedTrainer, *overrides: str, updates: int = 1) -> Run:
    folder.mkdir(exist_ok=True)
    run = run_in(folder, trainer, STEPS, "run.checkpoint_every=4", *overrides)  # type: ignore[arg-type]

    async def body() -> None:
        await run.load()
        await train(run, recorded(run, run.journal.reader), batches(run, updates))

    asyncio.run(body())
    return run


def verdicts(folder: Path) -> dict[int, StepVerdict]:
    return JournalReader(folder / "journal").verdicts()


def actions(folder: Path) -> dict[int, str]:
    return {step: verdict.action for step, verdict in verdicts(folder).items()}


def column(folder: Path, key: str) -> list[float]:
    return [row[key] for row in read_metrics(folder)]


def test_firings_go_down_the_ladder_and_each_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = GuardedTrainer(SPIKES)
    with pytest.raises(
        GuardStop, match=r"step 13 .*grad_norm is 1000, limit 50.*change guards.grad_norm or"
    ):
        go(tmp_path, trainer)
    assert actions(tmp_path) == {10: "warn", 11: "skip", 12: "roll_back", 13: "stop"}
    assert verdicts(tmp_path)[12].skipped == range(9, 13)
    assert trainer.taken == list(range(1, 9)), "the weights of step 8, and step 13 is not taken"
    assert column(tmp_path, "guard/fired") == [0] * 9 + [1] * 4
    assert column(tmp_path, "guard/skipped_steps") == [0] * 10 + [1, 4, 5]
    assert column(tmp_path, "grad_norm")[9:] == [1000.0] * 4
    said = capsys.readouterr().err
    for step in (10, 11, 12, 13):
        record = JournalReader(tmp_path / "journal").record(
            JournalReader(tmp_path / "journal").batch_of(step).name
        )
        worst = verdicts(tmp_path)[step].findings[0].samples
        assert set(worst) == {record.sample_ids[row] for row in record.rows(step)}
        assert f"step {step} (batch of steps {step} to {step})" in said and worst[0] in said
    assert [(tmp_path / "guards" / f"step-{s}").exists() for s in (10, 11, 12, 13)] == [
        False,
        True,
        True,
        True,
    ], "a warning needs no dump"


def test_a_stopped_run_stays_stopped_until_its_guards_change(tmp_path: Path) -> None:
    with pytest.raises(GuardStop):
        go(tmp_path, GuardedTrainer(SPIKES))
    idle = GuardedTrainer(SPIKES)
    for _ in range(2):
        with pytest.raises(GuardStop, match="step 13"):
            go(tmp_path, idle)
    assert idle.calls == [], "refused before the trainers load anything"
    changed = GuardedTrainer(SPIKES)
    go(tmp_path, changed, "guards.grad_norm=51")
    assert changed.taken == [*range(1, 9), 14] and changed.step == 14
    # The settings of the stop again: others have let the run go on since.
    go(tmp_path, GuardedTrainer(SPIKES))
    assert actions(tmp_path) == {10: "warn", 11: "skip", 12: "roll_back", 13: "stop"}


def test_behind_a_stop_that_was_overruled_the_ladder_begins_anew(tmp_path: Path) -> None:
    spikes = {**SPIKES, 14: {"grad_norm": 1000.0}}
    with pytest.raises(GuardStop):
        go(tmp_path, GuardedTrainer(spikes))
    trainer = GuardedTrainer(spikes)
    go(tmp_path, trainer, "guards.grad_norm=51")
    assert actions(tmp_path)[14] == "warn" and trainer.taken[-1] == 14


@pytest.mark.parametrize(
    ("overrides", "ahead"),
    [
        (["train.max_staleness=8"], 8),
        (["train.max_staleness=4", "train.updates_per_batch=2"], 8),
        (["algorithm.preset=dapo"], 1),
        ([], 0),
    ],
)
def test_nothing_of_rolled_back_weights_is_judged(
    tmp_path: Path, overrides: list[str], ahead: int
) -> None:
    """Groups that were begun ahead, and the surplus of dynamic sampling, are of the weights of before."""
    watch = run_in(tmp_path, GuardedTrainer({}), STEPS, *overrides).watch  # type: ignore[arg-type]
    watch.verdicts = {30: StepVerdict(30, "roll_back", [], 21, 30)}
    watch.past = [{"step": s, "reward/mean": 0.9 if s <= 20 else 0.0} for s in range(1, 31 + ahead)]

    def judged(step: int) -> set[str]:
        return {limit.guard for limit in watch.limits(step, rewarded=True)}

    assert ahead == 0 or not judged(30 + ahead) & {"logprob_gap", "reward_drop", "truncated"}
    assert "logprob_gap" in judged(31 + ahead) and "reward_drop" not in judged(31 + ahead)
    watch.past += [{"step": 31 + ahead + i, "reward/mean": 0.7} for i in range(7)]
    (floor,) = [x for x in watch.limits(38 + ahead, rewarded=True) if x.guard == "reward_drop"]
    assert floor.bound < 0, "seven healthy batches: not even a bad one would be a collapse"


def kill(run_kills: pytest.MonkeyPatch, point: str) -> None:
    """Kill the first controller that comes to the point, once."""
    where, when, step = point.split()
    left = [1]

    def killing(original: Callable[..., Any], at: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            hit = left[0] and at(*args, **kwargs)
            if hit:
                left[0] = 0
            if hit and when == "before":
                raise Killed
            result = original(*args, **kwargs)
            if hit:
                raise Killed
            return result

        return call

    def killing_call(original: Callable[..., Any]) -> Callable[..., Any]:
        async def call(self: GuardedTrainer, name: str, **args: Any) -> Any:
            hit = left[0] and (name, args.get("step")) == (where, int(step))
            if hit:
                left[0] = 0
            if hit and when == "before":
                raise Killed
            result = await original(self, name, **args)
            if hit:
                raise Killed
            return result

        return call

    if where == "verdict":
        kill_it = killing(Journal.add_verdict, lambda _, verdict: verdict.step == int(step))
        run_kills.setattr(Journal, "add_verdict", kill_it)
    elif where == "report":
        from agpo_megatron.observe.metrics import MetricsWriter

        kill_it = killing(MetricsWriter.write, lambda _, row: row["step"] == int(step))
        run_kills.setattr(MetricsWriter, "write", kill_it)
    else:
        run_kills.setattr(GuardedTrainer, "call", killing_call(GuardedTrainer.call))


OFTEN = ("roll_back before 12", "verdict before 11")
POINTS = [
    pytest.param(point, marks=() if point in OFTEN else pytest.mark.full)
    for point in [
        *(
            f"{where} {when} {step}"
            for step in (10, 11, 12, 13)
            for where in ("update", "verdict", "report")
            for when in ("before", "after")
        ),
        *(f"{where} {when} 12" for where in ("roll_back", "save") for when in ("before", "after")),
    ]
]


def outcome(folder: Path) -> list[Any]:
    """What was decided, and what every step was reported with."""
    judged = [
        (v.step, v.action, v.first, v.last, v.metrics, v.findings)
        for v in verdicts(folder).values()
    ]
    keys = ("step", "guard/fired", "guard/skipped_steps", "grad_norm")
    return [judged, *(column(folder, key) for key in keys)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The outcome of the run that nobody kills: stopped by a guard, and then allowed to go on."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.raises(GuardStop):
        go(folder, GuardedTrainer(SPIKES))
    trainer = GuardedTrainer(SPIKES)
    go(folder, trainer, "guards.grad_norm=51")
    assert trainer.taken == [*range(1, 9), 14]
    return outcome(folder)


@pytest.mark.parametrize("survives", [False, True], ids=["trainer-lost", "trainer-survived"])
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_durable_point_ends_in_the_same_run(
    tmp_path: Path, point: str, survives: bool, whole: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same verdicts, same weights, every step reported once with the same numbers."""
    first = GuardedTrainer(SPIKES)
    with monkeypatch.context() as patched:
        kill(patched, point)
        with pytest.raises((Killed, GuardStop)) as ended:
            go(tmp_path, first)
    assert ended.type is Killed
    with pytest.raises(GuardStop):
        go(tmp_path, first if survives else GuardedTrainer(SPIKES))
    last = GuardedTrainer(SPIKES)
    go(tmp_path, last, "guards.grad_norm=51")
    assert outcome(tmp_path) == whole
    assert last.taken == [*range(1, 9), 14]


def test_a_roll_back_without_a_checkpoint_goes_to_the_initial_weights(tmp_path: Path) -> None:
    trainer = GuardedTrainer({3: {"loss/policy": math.nan}})
    go(tmp_path, trainer, "guards.actions=[roll_back]", "run.checkpoint_every=50")
    assert trainer.taken == list(range(4, 15))
    assert verdicts(tmp_path)[3].skipped == range(1, 4)
    assert math.isnan(verdicts(tmp_path)[3].findings[0].value)
    again = GuardedTrainer({})
    replay(tmp_path, tmp_path / "again", again, STEPS)
    assert again.taken == trainer.taken, "the replay leaves out what the run left out"


def replay(source: Path, folder: Path, trainer: GuardedTrainer, last: int, *overrides: str) -> Run:
    """As ``assembly.execute`` does."""
    folder.mkdir()
    run = run_in(folder, trainer, STEPS, "run.checkpoint_every=50", *overrides)  # type: ignore[arg-type]
    reader, saved = JournalReader(source / "journal"), RunFolder(source).complete_checkpoints()

    async def body() -> None:
        begin = saved[-1] if saved and dumped_step(source) else (0, None)
        await run.load(reader, begin)
        await train(run, recorded(run, reader, last=last))

    asyncio.run(body())
    return run


@pytest.mark.parametrize(("step", "stops"), [(11, False), (12, False), (13, True)])
def test_a_dump_replays_to_the_same_finding(tmp_path: Path, step: int, stops: bool) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(GuardStop):
        go(run_dir, GuardedTrainer(SPIKES))
    dump, trainer = RunFolder(run_dir).dump(step), GuardedTrainer(SPIKES)
    assert dumped_step(dump) == step
    assert load_config(dump / "config.yaml").run.dir == str(run_dir)
    assert f"--replay {dump} --run-dir NEW" in replay_command(dump)
    new = tmp_path / "new"
    if stops:
        with pytest.raises(GuardStop):
            replay(dump, new, trainer, step)
    else:
        replay(dump, new, trainer, step)
    mine, theirs = verdicts(new)[step], verdicts(run_dir)[step]
    assert (mine.findings, mine.action, mine.metrics) == (
        theirs.findings,
        theirs.action,
        theirs.metrics,
    )
    assert [n for n, _ in trainer.calls].count("update") == {11: 3, 12: 3, 13: 1}[step]
    assert trainer.calls[0] == ("load", 12 if step == 13 else 8), "begins from the checkpoint"
    assert json.loads((dump / "finding.json").read_text())["step"] == step
    steps = {b.first_step for b in JournalReader(dump / "journal").batches()}
    assert steps == set(range(13 if step == 13 else 9, step + 1)), "no other batch"


def test_a_dump_outlives_what_it_was_made_of(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(GuardStop):
        go(run_dir, GuardedTrainer(SPIKES))
    dump = RunFolder(run_dir).dump(12)
    inodes = {p.name: p.stat().st_ino for p in (run_dir / "journal").rglob("*.arrow")}
    mine = list((dump / "journal").rglob("*.arrow"))
    assert mine and all(inodes[p.name] == p.stat().st_ino for p in mine), "hard links"
    for path in (run_dir / "journal").rglob("*.arrow"):
        path.unlink()
    replay(dump, tmp_path / "new", GuardedTrainer(SPIKES), 12)
    assert actions(tmp_path / "new")[12] == "roll_back"


def test_the_newest_four_dumps_of_a_run_are_kept(tmp_path: Path) -> None:
    spikes = {step: {"grad_norm": 1000.0} for step in range(9, 15)}
    go(tmp_path, GuardedTrainer(spikes), "guards.actions=[skip]")
    fired = [step for step, action in actions(tmp_path).items() if action == "skip"]
    dumps = sorted(int(p.name.removeprefix("step-")) for p in (tmp_path / "guards").iterdir())
    assert len(fired) > 4 and dumps == fired[-4:]


def test_what_is_known_before_the_update_holds_all_updates_of_the_batch(tmp_path: Path) -> None:
    """Two batches of four updates: the second breaks a limit of its rewards, which counts once."""
    trainer = GuardedTrainer({})
    with pytest.MonkeyPatch.context() as patched:
        low_rewards(patched, from_step=5)
        go(tmp_path, trainer, "guards.actions=[skip]", "reward.max_error_frac=0.5", updates=4)
    assert list(verdicts(tmp_path)) == [5, 9, 13]
    assert verdicts(tmp_path)[5].skipped == range(5, 9)
    assert trainer.taken == [1, 2, 3, 4]
    assert [n for n, s in trainer.calls if s == 5] == ["update"]
    assert [n for n, s in trainer.calls if s in (6, 7, 8)] == [*["pass_over"] * 3, "save"]


def low_rewards(patched: pytest.MonkeyPatch, from_step: int) -> None:
    """All answers of later batches end in an error of the reward."""
    original = Run.commit

    async def commit(self: Run, groups: Any, decision: Any, **rest: Any) -> Any:
        if self.version.step + 1 >= from_step:
            decision.metrics["reward/error_frac"] = 1.0
        return await original(self, groups, decision, **rest)

    patched.setattr(Run, "commit", commit)


def test_a_number_that_comes_out_otherwise_changes_no_decision(tmp_path: Path) -> None:
    """Trained again on another machine: a step that was taken is taken, one that was skipped is not."""
    trainer = GuardedTrainer({10: {"grad_norm": 1000.0}})
    with pytest.MonkeyPatch.context() as patched:
        kill(patched, "update before 12")
        with pytest.raises(Killed):
            go(tmp_path, trainer, "guards.actions=[skip]")
    other = GuardedTrainer({9: {"grad_norm": 1000.0}})
    go(tmp_path, other, "guards.actions=[skip]")
    assert other.taken == [s for s in range(1, 15) if s != 10]
    assert list(verdicts(tmp_path)) == [10]


def test_verdicts_stay_valid_and_those_of_a_superseded_start_do_not_count(tmp_path: Path) -> None:
    found = StepVerdict(
        3, "skip", [GuardFinding("entropy", "policy/entropy", 0.1, 0.5, ["a"])], 3, 3
    )
    first = Journal(tmp_path)
    first.add_verdict(found)
    second = Journal(tmp_path)
    second.pending_fragments(())  # which writes the list of what is valid anew
    first.add_verdict(replace(found, step=4))
    assert second.reader.verdicts() == {3: found}
    assert Journal(tmp_path).reader.verdicts() == {3: found}
    (path,) = (tmp_path / "verdicts").glob("verdict-00000003-*")
    path.write_text("{}")
    second.reader.read_patience = 0.0
    with pytest.raises(JournalError, match="verdict-00000003"):
        second.reader.verdicts()


@pytest.mark.parametrize(
    ("action", "moved"), [("warn", True), ("skip", False), ("roll_back", False)]
)
def test_a_step_that_is_not_taken_moves_no_weights(
    tmp_path: Path, action: str, moved: bool
) -> None:
    """What the publish after it is told: only where weights must differ are equal ones worth a warning."""
    trainer = GuardedTrainer({10: {"grad_norm": 1000.0}})
    run = run_in(tmp_path, trainer, STEPS, f"guards.actions=[{action}]")  # type: ignore[arg-type]

    async def body() -> None:
        await run.load()
        async for batch in batches(run, 1):
            run.moved = False  # as after a publish
            await run.advance(batch)
            if run.version.step == 10:
                return

    asyncio.run(body())
    assert run.moved == moved
