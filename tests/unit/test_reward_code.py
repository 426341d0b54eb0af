"""``code``: programs pass tests, in a jail that holds."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from agpo_megatron.reward import Problem, Response, Reward, jail
from agpo_megatron.reward.code import code, read_tests
from agpo_megatron.reward.loading import RewardError

pytestmark = pytest.mark.skipif(bool(jail.missing()), reason=f"no jail here: {jail.missing()}")
SUMS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}


def graded(source: str, tests: Any, **options: Any) -> Reward:
    reference = tests if isinstance(tests, str) else json.dumps(tests)
    return code(Problem([], reference), Response(f"so:\n```python\n{source}\n```\n"), **options)


def test_stdin_and_stdout() -> None:
    right = "a, b = map(int, input().split())\nprint(a + b)"
    assert graded(right, SUMS) == Reward(1.0, True, {"passed": 1.0})
    assert graded(right, [{"input": "1 2", "output": "3"}]).correct
    assert graded("import sys\n" + right + "\nsys.exit()", SUMS).correct
    wrong = right.replace("a + b", "a + b + (a > 2)")
    assert graded(wrong, SUMS) == Reward(0.0, False, {"passed": 0.5})
    assert graded(wrong, SUMS, partial=True) == Reward(0.5, False, {"passed": 0.5})
    assert not graded("print(", SUMS).correct


def test_asserts_and_functions() -> None:
    assert graded("def f(x): return x + 1", "assert f(1) == 2\nassert f(2) == 3").correct
    assert graded("def f(x): return x + 1", ["assert f(1) == 2", "assert f(2) == 3"]).correct
    assert not graded("def f(x): return x + 1", "assert f(1) == 3").correct
    calls = {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}
    assert graded("class Solution:\n    def add(self, a, b): return a + b", calls).correct
    assert graded("def add(a, b): return a + b", calls).correct
    assert not graded("def add(a, b): return a - b", calls).correct


@pytest.mark.parametrize(
    "leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"]
)
def test_leaving_before_the_asserts_is_no_pass(leave: str) -> None:
    assert not graded(f"def f(x): return x\n{leave}", "assert f(1) == 5").correct


def test_the_last_block_behind_the_thought_is_the_program() -> None:
    def said(text: str) -> bool | None:
        return code(Problem([], '[{"input": "", "output": "2"}]'), Response(text)).correct

    block = "```python\nprint({})\n```"
    assert said(block.format(1) + "better:\n" + block.format(2))
    assert said("<think>" + block.format(1) + "</think>" + block.format(2))
    assert not said("<think>" + block.format(2) + "</think> done")
    assert not said("print(2)")


def test_tests_that_cannot_be_read_are_an_error() -> None:
    for wrong in ("[]", "{}", '[{"in": 1}]', '[{"input": [], "output": 1, "fn_name": "a b"}]', ""):
        with pytest.raises(ValueError):
            read_tests(wrong)
    with pytest.raises(RewardError, match="isolation 'none' needs"):
        graded("print(1)", SUMS, isolation="none")


def witness(attempt: str) -> str:
    """A program that writes the name of the error that ``attempt`` meets, "done" if it meets none."""
    body = "\n".join(f"    {line}" for line in attempt.splitlines())
    return f"try:\n{body}\n    print('done')\nexcept BaseException as error:\n    print(type(error).__name__)"


@pytest.mark.parametrize(
    ("attempt", "error"),
    [
        ("import os\nos.fork()", "PermissionError"),
        ("import subprocess\nsubprocess.run(['/bin/true'])", "PermissionError"),
        ("import socket\nsocket.socket()", "PermissionError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 22))", "PermissionError"),
        ("open('{outside}/new', 'w')", "PermissionError"),
        ("open('{outside}/there', 'a')", "PermissionError"),
        ("open('{outside}/there').read()", "PermissionError"),
        ("import os\nos.unlink('{outside}/there')", "PermissionError"),
        ("import os\nos.truncate('{outside}/there', 0)", "PermissionError"),
        ("import os\nos.chmod('{outside}/there', 0)", "PermissionError"),
        ("import os\nos.utime('{outside}/there')", "PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("import os\nos.kill(1, 0)", "PermissionError"),
        ("x = bytearray(10**10)", "MemoryError"),
        ("open('big', 'wb').write(bytes(10**9))", "OSError"),
        (
            "import os\nassert list(os.environ) == ['HOME', 'TMPDIR', 'PATH', 'OMP_NUM_THREADS'], os.environ",
            "done",
        ),
        ("assert open('/proc/self/environ').read() in ('', '\\0')", "done"),
        ("open('mine', 'w').write('x')\nassert open('mine').read() == 'x'", "done"),
        ("import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()", "done"),
        ("import asyncio\nasyncio.run(asyncio.sleep(0))", "done"),
        ("import numpy\nassert numpy.arange(3).sum() == 3", "done"),
    ],
)
def test_the_jail_holds_and_lets_compute(tmp_path: Path, attempt: str, error: str) -> None:
    there = tmp_path / "there"
    there.write_text("kept")
    before = there.stat()
    source = witness(attempt.replace("{outside}", str(tmp_path)))
    assert graded(source, [{"input": "", "output": error}]).correct, attempt
    assert (there.read_text(), there.stat().st_mode) == ("kept", before.st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True: pass",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    except BaseException: pass",
        "while True: print('x' * 10**6)",
    ],
)
def test_what_does_not_end_is_ended(source: str) -> None:
    started = time.monotonic()
    assert not graded(
        source, [{"input": "", "output": "x"}], seconds=1.0, total_seconds=1.0
    ).correct
    assert time.monotonic() - started < 4
    assert not [
        p for p in psutil.Process().children(recursive=True) if "jail.py" in " ".join(p.cmdline())
    ]


def test_all_tests_together_have_a_limit() -> None:
    started = time.monotonic()
    tests = [{"input": "", "output": ""}] * 20
    reward = graded("import time\ntime.sleep(0.4)", tests, total_seconds=1.0, partial=True)
    assert 0 < reward.value <= 3 / 20 and not reward.correct
    assert time.monotonic() - started < 4


def test_with_limits_only_a_program_runs_too() -> None:
    assert graded("print(sum(map(int, input().split())))", SUMS, isolation="rlimits").correct
    assert os.path.exists(jail.__file__)
