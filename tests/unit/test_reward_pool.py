"""Rewards in worker processes: hostile answers cost their limit and nothing else; functions of one's own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from agpo_megatron.config.task import PartConfig, RewardConfig
from agpo_megatron.reward import Problem, Response
from agpo_megatron.reward.loading import RewardError
from agpo_megatron.reward.pool import RewardPool, Verdict

SEVEN = Problem([{"role": "user", "content": "3 + 4?"}], "7", "sums", {"level": 2, "tags": ["a"]})


def pooled(body: Callable[[RewardPool], Coroutine[Any, Any, Any]], **settings: Any) -> Any:
    async def run() -> Any:
        async with RewardPool(RewardConfig(**{"workers": 2, **settings})) as rewards:
            return await body(rewards)

    return asyncio.run(run())


def scored(
    texts: Sequence[str], *parts: PartConfig, problem: Problem = SEVEN, **settings: Any
) -> list[Verdict]:
    responses = [Response(text, 3) for text in texts]
    found: list[Verdict] = pooled(lambda p: p.score(problem, responses, parts), **settings)
    return found


def own(tmp_path: Path, code: str) -> str:
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(code))
    return f"{file}:score"


def test_responses_of_a_group_get_their_verdicts_in_order() -> None:
    verdicts = scored(["7", "8", "it is 7", "#### 6"] * 50, PartConfig(name="numeric"))
    assert [v.value for v in verdicts] == [1.0, 0.0, 1.0, 0.0] * 50
    assert [v.correct for v in verdicts] == [True, False, True, False] * 50


def test_a_function_of_a_file_sees_all_of_the_problem_and_the_response(tmp_path: Path) -> None:
    name = own(
        tmp_path,
        """
        from agpo_megatron.reward import Reward
        def score(problem, response, *, bonus=0.0):
            print("goes to the log")
            assert problem.fields == {"level": 2, "tags": ["a"]} and problem.source == "sums"
            assert problem.text == "3 + 4?" and response.tokens == 3 and not response.truncated
            near = 1 / (1 + abs(int(problem.answer) - int(response.text)))
            return Reward(near + bonus, near == 1, {"near": near})
        """,
    )
    verdicts = scored(["7", "8"], PartConfig(name=name, options={"bonus": 2.0}))
    assert verdicts == [Verdict(3.0, True, {"near": 1.0}), Verdict(2.5, False, {"near": 0.5})]


def test_correct_is_what_the_function_says_or_a_value_that_is_high_enough(tmp_path: Path) -> None:
    name = own(tmp_path, "def score(problem, response): return len(response.text) / 4")
    verdicts = scored(["a", "abc", "abcd"], PartConfig(name=name), correct_at=0.75)
    assert [(v.value, v.correct) for v in verdicts] == [(0.25, False), (0.75, True), (1.0, True)]


def test_parts_are_summed_by_weight_and_named() -> None:
    parts = [
        PartConfig(name="numeric"),
        PartConfig(name="format", weight=0.5, options={"pattern": "<a>.*</a>"}),
    ]
    verdicts = scored(["<a>7</a>", "7", "<a>8</a>"], *parts)
    assert [v.value for v in verdicts] == [0.5, 1.0, 0.5]  # 7</a> is no number
    verdicts = scored(["<a>so 7 </a>", "7", "<a>8 </a>"], *parts)
    assert [(v.value, v.correct) for v in verdicts][1] == (1.0, True)
    assert verdicts[1].parts == {"numeric": 1.0, "format": 0.0}
    twice = [PartConfig(name="regex", options={"pattern": p}) for p in ("7", "8")]
    (verdict,) = scored(["7"], *twice, parts[1])
    assert verdict.parts == {"regex1": 1.0, "regex2": 0.0, "format": 0.0}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("numbers", {}, "there is no reward 'numbers'; built in are numeric, math"),
        ("no.such:score", {}, "reward module no.such cannot be imported"),
        ("none.py:score", {}, "reward file none.py does not exist"),
        ("math", {"extrct": "box"}, r"reward math takes .*extract.*'extrct'"),
        ("agpo_megatron.reward.texts:nothing", {}, "has no function 'nothing'; it has .*choice"),
        ("http", {"uri": "x"}, "reward http has no option 'uri'; its options: url"),
        ("http", {}, "needs the option 'url'"),
        ("judge", {"url": "x", "token_env": "NOT_SET_HERE"}, "NOT_SET_HERE .* is not set"),
    ],
)
def test_a_reward_that_cannot_be_loaded_ends_the_run_at_its_start(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RewardError, match=message):
        pooled(lambda p: p.check([[PartConfig(name=name, options=options)]]))


def test_a_file_that_cannot_be_imported_says_why(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="ZeroDivisionError: division by zero"):
        pooled(lambda p: p.check([[PartConfig(name=own(tmp_path, "1 / 0"))]]))
    with pytest.raises(RewardError, match="is async"):
        pooled(
            lambda p: p.check([[PartConfig(name=own(tmp_path, "async def score(p, r): return 1"))]])
        )


HOSTILE = """
    import os, time, re, ctypes
    def score(problem, response):
        match response.text:
            case "hang": 9 ** 9 ** 9 ** 9
            case "sleep": time.sleep(600)
            case "swallow":
                while True:
                    try: time.sleep(600)
                    except BaseException: pass
            case "die": os._exit(3)
            case "segfault": ctypes.string_at(0)
            case "allocate": bytearray(10**12)
            case "raise": raise KeyError("x")
            case "nan": return float("nan")
            case "deep": score(problem, response)
        return 1.0
"""


def test_hostile_answers_cost_their_limit_and_disturb_nothing_else(tmp_path: Path) -> None:
    async def body(rewards: RewardPool) -> Any:
        texts = [
            "a",
            "hang",
            "b",
            "sleep",
            "die",
            "c",
            "swallow",
            "segfault",
            "allocate",
            "raise",
            "nan",
            "deep",
            "d",
        ]
        started = time.monotonic()
        parts = [PartConfig(name=own(tmp_path, HOSTILE))]
        verdicts = await rewards.score(SEVEN, [Response(t) for t in texts], parts)
        return dict(zip(texts, verdicts, strict=True)), time.monotonic() - started

    verdicts, seconds = pooled(body, timeout=1.0, max_error_frac=1.0)
    causes = {text: verdict.cause for text, verdict in verdicts.items()}
    assert causes == {
        **dict.fromkeys("abcd", ""),
        **dict.fromkeys(("hang", "sleep", "swallow"), "timeout"),
        **dict.fromkeys(("die", "segfault"), "died"),
        **dict.fromkeys(("raise", "nan"), "exception"),
        "allocate": "memory",
        "deep": "recursion",
    }
    assert all(v.value == (1.0 if v.cause == "" else 0.0) for v in verdicts.values())
    assert not any(v.correct for v in verdicts.values() if v.cause)
    assert seconds < 15  # three of 1 to 2 s over two workers, and starts


def test_hostile_mathematics() -> None:
    hostile = [
        "9^{9^{9^9}}",
        "(" * 300 + "7" + ")" * 300,
        "7" * 10**6,
        "\0",
        "(1+x)^{5000}",
        "10^{100000000}",
        "{" * 10**5,
    ]
    texts = [f"\\boxed{{{t}}}" for t in hostile] + ["\\boxed{7}", "\\boxed{x" + "[" * 300]
    started = time.monotonic()
    verdicts = scored(texts, PartConfig(name="math"), timeout=1.0, max_error_frac=1.0)
    assert [v.correct for v in verdicts] == [t == "\\boxed{7}" for t in texts] or verdicts[
        1
    ].correct
    assert verdicts[-2].correct and not verdicts[0].correct
    assert time.monotonic() - started < 40


def test_a_broken_verifier_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    name = own(tmp_path, "def score(problem, response): return {}['gone']")
    with pytest.raises(
        RewardError,
        match=r"100% of the last 64 .*'exception': 64.*max_error_frac 0.2.*KeyError: 'gone'",
    ):
        scored(["x"] * 80, PartConfig(name=name), max_error_frac=0.2)
    assert len(scored(["x"] * 80, PartConfig(name=name), max_error_frac=1.0)) == 80


def test_a_cancelled_group_leaves_no_verdict_for_the_next_one(tmp_path: Path) -> None:
    name = own(
        tmp_path,
        "import time\ndef score(p, r): time.sleep(0.3 * (r.text == 'slow')); return float(r.text == 'slow')",
    )

    async def body(rewards: RewardPool) -> list[Verdict]:
        await rewards.score(SEVEN, [Response("fast")], [PartConfig(name=name)])
        cancelled = asyncio.create_task(
            rewards.score(SEVEN, [Response("slow")] * 3, [PartConfig(name=name)])
        )
        await asyncio.sleep(0.1)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        return await rewards.score(SEVEN, [Response("fast")] * 2, [PartConfig(name=name)])

    assert [v.value for v in pooled(body, workers=1)] == [0.0, 0.0]


def test_samples_of_a_group_are_verified_side_by_side(tmp_path: Path) -> None:
    name = own(tmp_path, "import time\ndef score(p, r): time.sleep(0.5); return 1")

    async def body(rewards: RewardPool) -> float:
        await rewards.score(
            SEVEN, [Response("")] * 4, [PartConfig(name=name)]
        )  # all workers have started
        rewards.take_busy_seconds()
        await rewards.score(SEVEN, [Response("")] * 4, [PartConfig(name=name)])
        taken = rewards.take_busy_seconds()
        assert rewards.take_busy_seconds() == 0 < taken < rewards.busy_seconds
        return taken

    assert 0.5 <= pooled(body, workers=4) < 1.5  # one after the other: 2 s


def test_workers_do_not_outlive_a_killed_owner() -> None:
    program = """
import asyncio
from agpo_megatron.config.task import PartConfig, RewardConfig
from agpo_megatron.reward import Problem, Response
from agpo_megatron.reward.pool import RewardPool
async def body():
    async with RewardPool(RewardConfig(workers=1)) as rewards:
        await rewards.score(Problem([], "7"), [Response("7")], [PartConfig(name="numeric")])
        print(rewards._workers[0]._process.pid, flush=True)
        await asyncio.sleep(60)
asyncio.run(body())
"""
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    worker = int(owner.stdout.readline())
    assert psutil.pid_exists(worker)
    os.kill(owner.pid, 9)
    owner.wait()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(worker)


def test_a_response_with_a_failed_part_is_not_correct_whatever_the_others_are_worth(
    tmp_path: Path,
) -> None:
    broken = PartConfig(name=own(tmp_path, "def score(problem, response): raise KeyError"))
    (verdict,) = scored(
        ["7"],
        PartConfig(name="format", weight=2.0, options={"pattern": "7"}),
        broken,
        max_error_frac=1.0,
    )
    assert (verdict.value, verdict.correct, verdict.cause) == (2.0, False, "exception")
    (verdict,) = scored(["7"], PartConfig(name="numeric"), broken, wrong=-1.0, max_error_frac=1.0)
    assert (verdict.value, verdict.correct) == (0.0, False)  # 1 for the number, -1 for the error
