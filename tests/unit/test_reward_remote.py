"""``http`` and ``judge`` against a real server: batches, retries, tokens, what a judge says, what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from agpo_megatron.config.task import PartConfig, RewardConfig
from agpo_megatron.reward import Problem, Response
from agpo_megatron.reward.loading import RewardError
from agpo_megatron.reward.pool import RewardPool, Verdict

PROBLEM = Problem([{"role": "user", "content": "3 + 4?"}], "7", "sums", {"level": 1})
Handler = Callable[[dict[str, Any], web.Request], Any]


def asked(
    handler: Handler, name: str, texts: list[str], **options: Any
) -> tuple[list[Verdict], list[Any]]:
    """Verdicts on ``texts`` from a server that answers with ``handler(body, request)``, and the bodies it was sent."""
    bodies: list[Any] = []

    async def serve(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        answer = handler(bodies[-1], request)
        if isinstance(answer, Awaitable):
            answer = await answer
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)

    async def run() -> list[Verdict]:
        app = web.Application()
        app.router.add_post("/", serve)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        part = PartConfig(
            name=name, options={"url": f"http://127.0.0.1:{port}/", "backoff": 0.01, **options}
        )
        try:
            async with RewardPool(RewardConfig(workers=1, max_error_frac=1.0)) as pool:
                return await pool.score(PROBLEM, [Response(t, 5) for t in texts], [part])
        finally:
            await runner.cleanup()

    return asyncio.run(run()), bodies


def lengths(body: dict[str, Any], _: web.Request) -> dict[str, Any]:
    rewards: list[Any] = [len(item["response"]["text"]) / 4 for item in body["items"]]
    rewards[0] = {"value": rewards[0], "correct": True, "parts": {"a": 1}}
    return {"rewards": rewards}


def test_http_is_asked_in_batches_about_all_of_the_problem() -> None:
    verdicts, bodies = asked(lengths, "http", ["a", "ab", "abc", "abcd", ""], batch=2)
    assert [v.value for v in verdicts] == [0.25, 0.5, 0.75, 1.0, 0.0]
    assert [v.correct for v in verdicts] == [True, False, True, True, True]
    assert sorted(len(body["items"]) for body in bodies) == [1, 2, 2]
    item = next(i for b in bodies for i in b["items"] if i["response"]["text"] == "a")
    assert item["problem"]["fields"] == {"level": 1} and item["response"]["tokens"] == 5


def test_a_busy_server_is_asked_again_with_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    seen: list[str] = []

    def busy(body: dict[str, Any], request: web.Request) -> Any:
        seen.append(request.headers.get("Authorization", ""))
        return lengths(body, request) if len(seen) > 2 else web.Response(status=503)

    verdicts, _ = asked(busy, "http", ["abcd"], token_env="JUDGE_TOKEN")
    assert verdicts[0].value == 1.0 and seen == ["Bearer secret"] * 3


@pytest.mark.parametrize(
    ("answer", "tries", "said"),
    [
        (lambda b, r: web.Response(status=503, text="full"), 3, "status 503: full"),
        (
            lambda b, r: web.Response(status=400, text="no such field"),
            1,
            "status 400: no such field",
        ),
        (lambda b, r: {"rewards": [1, 2]}, 1, "2 rewards for 1 responses"),
        (lambda b, r: {"scores": [1]}, 1, "KeyError: 'rewards'"),
        (lambda b, r: {"rewards": ["good"]}, 1, "must return a number"),
        (lambda b, r: web.Response(text="<html>"), 1, "JSONDecodeError"),
        (lambda b, r: asyncio.sleep(5), 3, "TimeoutError"),
    ],
)
def test_what_goes_wrong_is_an_error_of_its_own_kind(
    answer: Handler, tries: int, said: str
) -> None:
    (verdict,), bodies = asked(answer, "http", ["x"], retries=2, timeout=0.2)
    assert (verdict.value, verdict.correct, verdict.cause) == (0.0, False, "http")
    assert said in verdict.error
    assert len(bodies) == tries


def judged(said: str, **options: Any) -> Verdict:
    reply = {"choices": [{"message": {"content": said}}]}
    return asked(lambda b, r: reply, "judge", ["x"], **options)[0][0]


def test_a_judge_is_asked_with_the_template_and_its_verdict_is_parsed() -> None:
    reply = {"choices": [{"message": {"content": "<think>VERDICT: no</think> VERDICT: **yes**"}}]}
    texts = ["<think>hm</think>it is {answer}", "b"]
    verdicts, bodies = asked(
        lambda b, r: reply, "judge", texts, model="m", template="Q {problem} A {answer} R {response}",
        request={"max_tokens": 9},
    )  # fmt: skip
    assert [(v.value, v.correct) for v in verdicts] == [(1.0, True)] * 2
    body = next(b for b in bodies if "it is" in b["messages"][0]["content"])
    assert body["messages"] == [{"role": "user", "content": "Q 3 + 4? A 7 R it is {answer}"}]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 9, 0)


def test_what_a_judge_may_say() -> None:
    assert judged("VERDICT: no. Or rather VERDICT: correct").correct
    assert not judged("VERDICT: Incorrect").correct
    graded = judged("Score: 7/10", parse=r"Score:\s*([\d.]+)", scale=10.0)
    assert (graded.value, graded.correct, graded.cause) == (0.7, False, "")
    mute = judged("I cannot say")
    assert (mute.value, mute.cause) == (0.0, "http") and "finds nothing" in mute.error


def test_options_are_checked() -> None:
    async def check(**options: Any) -> None:
        async with RewardPool(RewardConfig(workers=1)) as pool:
            await pool.check([[PartConfig(name="judge", options=options)]])

    with pytest.raises(RewardError, match="no option 'modell'"):
        asyncio.run(check(url="http://x", modell="m"))
