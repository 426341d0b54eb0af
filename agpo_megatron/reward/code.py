"""``code``: the program in the answer passes the tests of its row, in a jail (jail.py)."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
from typing import Any

from agpo_megatron.reward import jail
from agpo_megatron.reward.contract import Problem, Response, Reward
from agpo_megatron.reward.extraction import after_thought
from agpo_megatron.reward.loading import RewardError

BLOCK = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
START_SECONDS = 5.0  # for the interpreter that forks the tests
FILE_MB = 64


def code(
    problem: Problem,
    response: Response,
    *,
    seconds: float = 4.0,
    total_seconds: float = 8.0,
    memory_mb: int = 1024,
    partial: bool = False,
    isolation: str = "jail",
) -> Reward:
    """Run the last fenced block of Python on every test; with ``partial``, the value is the share of tests passed.

    The reference (``data.sources[].answer_key``) holds the tests: ``{"inputs": [...], "outputs": [...]}`` or a list of
    ``{"input", "output"}`` (stdin and what must be written, line by line, trailing space aside; with ``"fn_name"``:
    arguments and results of that function), or assert statements, as a text or a list of texts.

    ``seconds``, ``total_seconds``: limits of one test and of all. ``memory_mb``: of a test. ``isolation``: "rlimits"
    runs it where the kernel has no jail, with limits only: it could then open sockets and write files. Raises
    RewardError where there is no jail, ValueError if the tests cannot be read.
    """
    lacking = jail.missing() if isolation == "jail" else ""
    if lacking or isolation not in ("jail", "rlimits"):
        raise RewardError(
            f"reward code: isolation {isolation!r} needs {lacking or 'to be jail or rlimits'}; run the controller on "
            "a machine that has it, or set the option isolation: rlimits if what models write may touch this one"
        )
    tests = read_tests(problem.answer)
    blocks = BLOCK.findall(after_thought(response.text) or "")
    if not blocks:
        return Reward(0.0, False)
    nonce = secrets.token_hex(16)
    limits = {
        "seconds": seconds,
        "total_seconds": total_seconds,
        "memory_mb": memory_mb,
        "file_mb": FILE_MB,
        "locked": isolation == "jail",
    }
    asked = [{"stdin": test["stdin"], "after": test["after"]} for test in tests]
    job = {"code": blocks[-1], "tests": asked, "limits": limits, "nonce": nonce, "all": partial}
    results = _run(job, total_seconds + START_SECONDS)
    passed = sum(_passed(test, result, nonce) for test, result in zip(tests, results, strict=False))
    share = passed / len(tests)
    return Reward(share if partial else float(share == 1), share == 1, {"passed": share})


def read_tests(text: str) -> list[dict[str, Any]]:
    """The tests as ``{"stdin", "after", "output"}``; ``output`` None where only the end counts. Raises ValueError."""
    try:
        given = json.loads(text)
    except ValueError:
        given = [text]
    if isinstance(given, dict) and "inputs" in given and "outputs" in given:
        function = given.get("fn_name")
        given = [
            {"input": i, "output": o, "fn_name": function}
            for i, o in zip(given["inputs"], given["outputs"], strict=True)
        ]
    if not isinstance(given, list) or not given:
        raise ValueError(
            f"no tests in {text[:80]!r}: inputs and outputs, a list of them, or asserts"
        )
    return [_test(test) for test in given]


def _test(test: Any) -> dict[str, Any]:
    if isinstance(test, str) and test.strip():
        return {"stdin": "", "after": test, "output": None}
    if isinstance(test, dict) and "input" in test and "output" in test:
        if test.get("fn_name"):
            return {"stdin": "", "after": _call(test), "output": None}
        return {"stdin": _lines(test["input"]), "after": "", "output": _lines(test["output"])}
    raise ValueError(f"{str(test)[:80]!r} is no test: {{'input', 'output'}} or assert statements")


def _call(test: dict[str, Any]) -> str:
    """A call of a function, or of a method of ``Solution``, with arguments from JSON, and what it must return."""
    arguments, expected = json.dumps(test["input"]), json.dumps(test["output"])
    name = str(test["fn_name"])
    if not name.isidentifier():
        raise ValueError(f"fn_name {name[:80]!r} is no name of a function")
    return (
        "import json as _json\n"
        f"_function = globals().get({name!r}) or getattr(Solution(), {name!r})\n"
        f"_found = _function(*_json.loads({arguments!r}))\n"
        f"_expected = _json.loads({expected!r})\n"
        "_found = _json.loads(_json.dumps(_found))\n"
        "assert _found == _expected or [_found] == _expected\n"
    )


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _passed(test: dict[str, Any], result: dict[str, Any], nonce: str) -> bool:
    if result["status"] != "ok" or not result["output"].endswith(nonce):
        return False
    output = result["output"].removesuffix(nonce)
    return test["output"] is None or _trimmed(output) == _trimmed(test["output"])


def _trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _run(job: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """The jail's results. Its process dies with this one, its children with it."""
    done = subprocess.run(
        [sys.executable, "-I", jail.__file__],
        input=json.dumps(job).encode(),
        capture_output=True,
        timeout=seconds,
        check=False,
        env={},  # a child could read what this process was started with (/proc/self/environ)
    )
    if done.returncode != 0:
        raise RuntimeError(f"the jail failed: {done.stderr.decode(errors='replace')[-300:]}")
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results
