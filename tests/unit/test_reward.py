"""Numeric verification, and workers that can hang or die without taking the run along."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import made
import psutil
import pytest

from agpo_megatron.config.schema import RewardConfig
from agpo_megatron.reward.numeric import extract_number, verify_numeric
from agpo_megatron.reward.workers import RewardPool
from agpo_megatron.samples import Group

pytestmark = pytest.mark.processes


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("the answer is 42.", "42"),
        ("first 7, then 1,234", "1234"),
        (r"so \boxed{12} and later 99", "12"),
        (r"\boxed{3} no, \boxed{-4.50}", "-9/2"),
        (r"\boxed{\frac{1}{2}}", "1/2"),
        (r"-\dfrac{3}{4}", "-3/4"),
        (r"\boxed{2^{10}}", None),  # two numbers in the box: no exact numeric answer
        ("so 7-4", "4"),  # an operator is no sign
        ("x = -4", "-4"),
        ("it costs -$1,234.50", "-2469/2"),
        (r"1{,}234\,\text{m}", "1234"),
        ("1,2345", "2345"),  # not a thousands separator
        (r"\boxed{$1,000$}", "1000"),
        ("work 3+4=7\n#### 8", "8"),
        ("#### 8\nbut then 9", "8"),
        ("####", None),
        (r"\boxed{unclosed 5", "5"),
        ("3/4", "3/4"),
        ("1/0", None),
        ("nothing", None),
        ("", None),
        ("9" * 400, None),
    ],
)
def test_the_number_of_an_answer(response: str, number: str | None) -> None:
    found = extract_number(response)
    assert (str(found) if found is not None else None) == number


def test_match_is_exact_and_by_value() -> None:
    assert verify_numeric("#### 1,000", "it is 1000.0")
    assert verify_numeric("0.5", "1/2")
    assert not verify_numeric("7", "70")
    assert not verify_numeric("7", "-7")
    with pytest.raises(ValueError, match="holds no number"):
        verify_numeric("none", "5")


def group(texts: list[str], answer: str = "7") -> Group:
    prompt = made.prompt(0, [1], answer)
    samples = [made.sample(prompt, i, 1, text=t) for i, t in enumerate(texts)]
    return Group(prompt, samples)


def test_a_group_is_scored_in_worker_processes() -> None:
    async def body() -> Group:
        async with RewardPool(RewardConfig()) as rewards:
            return await rewards.score_group(group(["7", "8", "it is 7", "#### 6"]))

    scored = asyncio.run(body())
    assert [s.accuracy for s in scored.samples] == [1.0, 0.0, 1.0, 0.0]
    assert {s.reward_error for s in scored.samples} == {""}


HANGS_ON_SEVEN = """
import json, sys, time
for line in sys.stdin:
    if json.loads(line)["response"] == "7": time.sleep(600)
    if json.loads(line)["response"] == "die": raise SystemExit
    print(json.dumps({"correct": True}), flush=True)
"""


def test_a_hanging_or_dying_worker_costs_one_wrong_answer_and_is_replaced() -> None:
    async def body() -> tuple[Group, float, float]:
        started = time.monotonic()
        command = [sys.executable, "-c", HANGS_ON_SEVEN]
        async with RewardPool(RewardConfig(timeout=1.0), command, workers=1) as rewards:
            scored = await rewards.score_group(group(["8", "7", "9", "die", "10"]))
            return scored, rewards.take_busy_seconds(), time.monotonic() - started

    scored, busy, seconds = asyncio.run(body())
    assert [s.accuracy for s in scored.samples] == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert "no verdict in 1.0 s" in scored.samples[1].reward_error
    assert "died" in scored.samples[3].reward_error
    assert 1.0 < busy <= seconds < 20
    assert not [p for p in psutil.Process().children() if HANGS_ON_SEVEN in " ".join(p.cmdline())]


SLOW_ON_SEVEN = """
import json, sys, time
for line in sys.stdin:
    response = json.loads(line)["response"]
    if response == "7": time.sleep(0.5)
    print(json.dumps({"correct": response == "7"}), flush=True)
"""


def test_a_cancelled_verification_leaves_no_verdict_for_the_next_answer() -> None:
    async def body() -> bool:
        command = [sys.executable, "-c", SLOW_ON_SEVEN]
        async with RewardPool(RewardConfig(), command, workers=1) as rewards:
            await rewards.verify("7", "1")
            cancelled = asyncio.create_task(rewards.verify("7", "7"))
            await asyncio.sleep(0.1)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            return (await rewards.verify("7", "8")).correct

    assert asyncio.run(body()) is False


def test_workers_do_not_outlive_a_killed_owner() -> None:
    program = """
import asyncio, os
from agpo_megatron.config.schema import RewardConfig
from agpo_megatron.reward.workers import RewardPool
async def body():
    async with RewardPool(RewardConfig()) as rewards:
        await rewards.verify("7", "7")
        print([p.pid for p in rewards._started][0], flush=True)
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
