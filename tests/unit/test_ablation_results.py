"""What tools/ablate.py makes of finished runs: their measures, comparison, decision, tables and picture."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from agpo_megatron.config import Config, load_config

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from ablation.comparison import compare, decide, paired_interval
from ablation.measures import HeldOut, Measured, curves_of, held_out
from ablation.plan import Cell
from ablation.report import frontier, write_report
from ablations import FILE, plan_of

STEP = {
    "reward/accuracy": 0.5,
    "response/tokens_mean": 30.0,
    "loss/unclipped": 1.0,
    "group/zero_variance_frac": 0.25,
    "policy/entropy": 0.3,
    "tokens/trained": 100,
    "grad_norm": 1.0,
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(FILE["config"], ["train.prompts_per_batch=8"], str(tmp_path))


def test_curves_count_what_was_wasted_and_leave_out_what_was_not_measured(config: Config) -> None:
    rows = [
        {"step": 1, **STEP},
        {"step": 2, **STEP, "loss/unclipped": 3.0, "sampling/discarded_groups": 8},
        {"step": 3, **STEP, "loss/clip_gate": 0.0, "tokens/trained": 0, "grad_norm": 0.0},
    ]
    curves = curves_of(rows, config)
    assert list(curves.index) == [1, 2, 3]
    assert list(curves["wasted samples"]) == [0.25, (0.25 + 1) / 2, 1.0]
    assert list(curves["closed"]) == [0.0, 0.0, 1.0]
    assert list(curves["entropy"].isna()) == [False, False, True]
    assert list(curves["loss fluctuation"]) == pytest.approx([0.0, math.sqrt(2), math.sqrt(4 / 3)])
    assert list(curves["generated tokens"]) == [30 * 8 * 8, 30 * 8 * 8 * 2, 30 * 8 * 8]


def test_with_several_updates_a_batch_is_generated_once(config: Config) -> None:
    two = config.model_copy(
        update={"train": config.train.model_copy(update={"updates_per_batch": 2})}
    )
    batch = {k: v for k, v in STEP.items() if not k.startswith(("reward", "response", "group"))}
    curves = curves_of([{"step": 1, **STEP}, {"step": 2, **batch}], two)
    assert list(curves["generated tokens"]) == [30 * 8 * 8, 0.0]
    assert list(curves["training accuracy"]) == [0.5, 0.5]


def test_the_numbers_of_a_cell(config: Config) -> None:
    """Ten steps; late are the last two of them."""
    norms = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.5, 0.0, 2.0]
    rows = [
        {
            "step": s,
            **STEP,
            "reward/accuracy": s / 10,
            "policy/entropy": 0.1 * abs(s - 4) + 0.05,
            "loss/unclipped": float(s),
            "loss/kl": s / 100,
            "group/zero_variance_frac": s / 20,
            "grad_norm": norm,
            "tokens/trained": 100 * norm,
            "loss/clip_gate": float(norm > 0),
        }
        for s, norm in enumerate(norms, 1)
    ]
    held = held_out(
        pd.DataFrame(
            [(0, True, 10, "stop"), (0, False, 30, "length")],
            columns=["problem", "correct", "tokens", "finish_reason"],
        )
    )
    found = Measured(held, held, curves_of(rows, config)).summary()
    up_to_nine, all_ten = np.array(norms[:9]), np.array(norms)
    assert found == pytest.approx(
        {
            "accuracy": 0.5,
            "accuracy before": 0.5,
            "tokens": 20,
            "tokens before": 20,
            "gap before": -20,
            "truncated": 0.5,
            "training accuracy, late": 0.95,
            "loss fluctuation, late": (math.sqrt(60 / 8) + math.sqrt(82.5 / 9)) / 2,
            "gradient fluctuation, late": np.mean(
                [x.std(ddof=1) / x.mean() for x in (up_to_nine, all_ten)]
            ),
            "wasted samples, late": (1.0 + 0.5) / 2,
            "entropy floor": 0.05,
            "closed gates": 0.1,
            "gradient spikes": 0.1,
            "KL": 0.055,
            "generated tokens": 10 * 30 * 8 * 8,
        }
    )


def test_held_out_samples_by_problem() -> None:
    rows = [
        (0, True, 10),
        (0, False, 30),
        (1, True, 20),
        (1, True, 22),
        (2, False, 40),
        (2, False, 80),
    ]
    samples = pd.DataFrame(rows, columns=["problem", "correct", "tokens"])
    samples["finish_reason"] = ["stop"] * 5 + ["length"]
    found = held_out(samples)
    assert list(found.accuracy) == [0.5, 1.0, 0.0]
    assert list(found.tokens) == [20, 21, 60]
    assert list(found.right_tokens[:2]) == [10, 21] and np.isnan(found.right_tokens[2])
    assert found.gap[0] == -20 and np.isnan(found.gap[1:]).all()
    assert found.truncated == pytest.approx(1 / 6)


def test_the_interval_knows_seeds_and_problems() -> None:
    rng = np.random.default_rng(0)
    one = paired_interval([rng.normal(0.5, 1.0, 400)])
    assert one.high - one.low == pytest.approx(2 * 1.96 / 20, rel=0.1)
    assert one.low < 0.5 < one.high
    reach = 4.302653 * 0.2 / math.sqrt(3)  # t of two degrees of freedom, standard error
    seeds = paired_interval([np.full(50, 0.1), np.full(50, -0.1), np.full(50, 0.3)])
    assert (seeds.mean, seeds.low, seeds.high) == pytest.approx((0.1, 0.1 - reach, 0.1 + reach)), (
        "no problem differs, seeds do"
    )
    # A seed counts as often as it has pairs.
    uneven = paired_interval([np.full(30, 1.0), np.full(10, 0.0)])
    error = math.sqrt(2 * ((0.75 * 0.25) ** 2 + (0.25 * 0.75) ** 2))
    assert (uneven.mean, uneven.high) == pytest.approx((0.75, 0.75 + 12.7062 * error))
    gaps = paired_interval([np.array([1.0, np.nan, 1.0]), np.array([np.nan, np.nan, np.nan])])
    assert (gaps.mean, gaps.low, gaps.high) == (1.0, 1.0, 1.0)
    assert math.isnan(paired_interval([]).mean)
    single = paired_interval([np.array([np.nan, 2.0])])
    assert single.mean == 2.0 and math.isnan(single.low) and math.isnan(single.high)


@pytest.mark.parametrize("spread", [0.0, 0.1], ids=["seeds agree", "seeds differ"])
def test_the_interval_holds_the_truth_in_95_of_100_ablations(spread: float) -> None:
    """Three seeds of 200 problems; the noise of their mean is 0.02."""
    rng = np.random.default_rng(0)
    intervals = [
        paired_interval([rng.normal(rng.normal(0, spread), 0.3, 200) for _ in range(3)])
        for _ in range(2000)
    ]
    assert 0.93 < np.mean([i.low <= 0 <= i.high for i in intervals]) < 0.97


def cell(
    config: Config, accuracy: list[float], right: list[float], tokens: float = 30.0
) -> Measured:
    """A run of three steps, each with twice the accuracy of the one before."""
    held = HeldOut(
        np.array(accuracy), np.array(right), np.array(right), np.full(len(right), 2.0), 0.0
    )
    rows = [
        {"step": s, **STEP, "reward/accuracy": 0.2 * s, "response/tokens_mean": tokens}
        for s in (1, 2, 3)
    ]
    return Measured(held, held, curves_of(rows, config))


@pytest.fixture
def results(config: Config) -> dict[Cell, Measured]:
    nan = float("nan")
    found = {}
    for seed in (1, 2):
        for task in ("sums", "needed"):
            found[Cell("grpo", task, seed)] = cell(config, [0.5, 1.0, 0.25], [20, 30, nan])
        found[Cell("v3", "sums", seed)] = cell(config, [0.75, 1.0, 0.25], [10, 30, 50], tokens=20.0)
    found[Cell("v3", "needed", 1)] = cell(config, [0.25, 1.0, 0.25], [20, 30, nan])
    return found


def test_arms_are_compared_on_the_same_problems(
    tmp_path: Path, results: dict[Cell, Measured]
) -> None:
    compared = {(c.arm, c.task): c for c in compare(plan_of(tmp_path), results)}
    v3 = compared["v3", "sums"]
    assert v3.accuracy.mean == pytest.approx(0.25 / 3)
    assert (v3.tokens.mean, v3.solved) == (-5.0, 4), (
        "of the problems that both solve; the third only v3 does"
    )
    assert v3.saved == pytest.approx(10 / 50)
    assert (v3.seeds, v3.deviations["accuracy"]) == ([1, 2], 0.0)
    assert v3.means["generated tokens"] == 20 * 64 * 3
    # when v3 has ended, grpo has generated two thirds: step 2
    assert v3.at_tokens.mean == v3.at_tokens.high == pytest.approx(0.4 - 0.3)
    assert compared["grpo", "sums"].at_tokens.mean == 0.0
    assert compared["grpo", "sums"].accuracy.mean == 0.0


def test_the_decision_follows_the_rule_of_the_file(
    tmp_path: Path, results: dict[Cell, Measured], config: Config
) -> None:
    plan = plan_of(tmp_path)
    grpo, v3 = decide(plan, compare(plan, results))
    assert (grpo["arm"], grpo["passes"]) == ("grpo", True)
    assert (v3["passes"], v3["task"], v3["complete"]) == (False, "needed", False)
    assert v3["worst"] == pytest.approx(-0.25 / 3)
    for seed in (1, 2):
        results[Cell("v3", "needed", seed)] = cell(config, [0.49, 1.0, 0.25], [20, 30, 40])
    best = decide(plan, compare(plan, results))[0]
    assert (best["arm"], best["passes"], best["complete"]) == ("v3", True, True)
    assert best["saved"] == pytest.approx(0.1), "mean over tasks"
    control = plan_of(tmp_path, decision={"controls": ["v3"]})
    assert decide(control, compare(control, results))[0]["arm"] == "grpo"


def test_the_report_is_one_page_that_needs_nothing_else(
    tmp_path: Path, results: dict[Cell, Measured], config: Config
) -> None:
    plan = plan_of(tmp_path)
    results[Cell("v3", "sums", 2)] = cell(config, [0.5, 1.0, 0.25], [20, 30, 50])
    plan.out.mkdir()
    text = write_report(plan, results, {"v3,sums,1": 61.0})
    assert "7 of 8 cells" in text
    assert (
        "| `v3` | 62.5 ± 5.9 | +4.2 [-48.8, +57.1] | 31.7 ± 2.4 | -2.50 [-34.27, +29.27] | +10.0 % | 4 | 2 |"
        in text
    )
    assert "| arm | sums | needed | seeds |" in text
    assert "| `v3` | +4.2, +10.0 % | -8.3, +0.0 % | 1 |" in text
    page = (plan.out / "results.html").read_text()
    assert 'src="data:image/png;base64,' in page and "http" not in page
    assert "<code>python tools/ablate.py" in page and "--only v3,sums,1 --out DIR" in page
    numbers = json.loads((plan.out / "results.json").read_text())
    assert numbers["decision"][0]["arm"] == "grpo"
    (mine,) = [c for c in numbers["cells"] if c["cell"] == "v3,sums,1"]
    assert (mine["seconds"], mine["KL"]) == (61.0, None)
    assert (plan.out / "frontier.png").read_bytes()[1:4] == b"PNG"


def test_the_picture_shows_the_paired_differences(
    tmp_path: Path, results: dict[Cell, Measured], config: Config
) -> None:
    plan = plan_of(tmp_path)
    results[Cell("v3", "sums", 2)] = cell(config, [0.5, 1.0, 0.25], [20, 30, 50])
    panels = frontier(plan, compare(plan, results)).axes
    points = {
        (axes.get_title(), bars.get_label()): [float(x[0]) for x in bars.lines[0].get_data()]
        for axes in panels
        for bars in axes.containers
    }
    assert points["sums", "grpo"] == [0, 0]
    assert points["sums", "v3"] == pytest.approx([-2.5, 100 / 24])
    assert points["needed", "v3"] == pytest.approx([0, -100 / 12])
    (v3,) = (b for b in panels[0].containers if b.get_label() == "v3")
    across, upright = (bars.get_segments()[0] for bars in v3.lines[2])
    t = 12.7062  # of one degree of freedom; the means of the two seeds are the ends of mean -+ standard error
    assert across[:, 0] == pytest.approx([-2.5 - 2.5 * t, -2.5 + 2.5 * t])
    assert upright[:, 1] == pytest.approx([100 / 24 * (1 - t), 100 / 24 * (1 + t)])
