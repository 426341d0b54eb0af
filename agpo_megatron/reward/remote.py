"""``http`` and ``judge``: rewards that a server says. Asked by the run itself, many at a time; no worker is held up."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import aiohttp

from agpo_megatron.reward.contract import Problem, Response, Reward, as_reward
from agpo_megatron.reward.extraction import after_thought
from agpo_megatron.reward.loading import RewardError

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_PAUSE = 30.0  # seconds between two tries


@dataclass(frozen=True)
class RemoteOptions:
    """Options of ``http`` and ``judge``.

    ``url``: where to post; for ``judge`` the address of chat completions (``http://host:port/v1/chat/completions``).
    ``token_env``: environment variable with a bearer token ("": none). ``timeout``: seconds of one request.
    ``retries``: further tries after connection errors, time-outs and status 408, 425, 429, 5xx, with pauses of
    ``backoff`` seconds that double. ``in_flight``: requests at once. ``batch``: responses in one request of ``http``.
    """

    url: str
    token_env: str = ""
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 0.5
    in_flight: int = 32
    batch: int = 16


@dataclass(frozen=True)
class JudgeOptions(RemoteOptions):
    """Options of ``judge`` beside those of ``http``.

    ``model``: name in the request. ``template``: prompt of the judge, with ``{problem}``, ``{answer}``,
    ``{response}`` (behind its last ``</think>``). ``parse``: pattern whose last match in the judge's answer, behind
    its last ``</think>``, is the verdict (its first group, if it has one): a number, or one of yes, no, true,
    false, correct, incorrect, right, wrong. ``scale``: what the number is divided by. ``request``: further fields
    (temperature, max_tokens, ...).
    """

    model: str = "default"
    template: str = (
        "Problem:\n{problem}\n\nReference answer:\n{answer}\n\nResponse:\n{response}\n\n"
        "Is the final answer of the response equivalent to the reference? End with VERDICT: yes or VERDICT: no."
    )
    parse: str = r"VERDICT:\s*\**(\w+)"
    scale: float = 1.0
    request: Mapping[str, Any] = field(default_factory=dict)


VERDICTS = {
    **dict.fromkeys(("yes", "true", "correct", "right"), True),
    **dict.fromkeys(("no", "false", "incorrect", "wrong"), False),
}


class RemoteReward:
    """One remote reward. Raises RewardError for options that it does not have, or a token that is not there."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        kind = JudgeOptions if name == "judge" else RemoteOptions
        known = [option.name for option in fields(kind)]
        unknown = sorted(set(options) - set(known))
        if unknown or "url" not in options:
            wrong = f"no option {unknown[0]!r}" if unknown else "needs the option 'url'"
            raise RewardError(f"reward {name} has {wrong}; its options: {', '.join(known)}")
        self.options = kind(**options)
        token = self.options.token_env
        if token and not os.environ.get(token):
            raise RewardError(
                f"reward {name}: the environment variable {token} (token_env) is not set where the controller runs"
            )
        if isinstance(self.options, JudgeOptions):
            self._parse = re.compile(self.options.parse)
        self._headers = {"Authorization": f"Bearer {os.environ[token]}"} if token else {}
        self._free = asyncio.Semaphore(self.options.in_flight)
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def score(self, problem: Problem, responses: Sequence[Response]) -> list[Any]:
        """Return, as a worker does, ``[value, correct, parts]`` or ``{"cause": "http", "error"}`` per response."""
        size = 1 if isinstance(self.options, JudgeOptions) else self.options.batch
        batches = [responses[i : i + size] for i in range(0, len(responses), size)]
        found = await asyncio.gather(*(self._batch(problem, batch) for batch in batches))
        return [result for batch in found for result in batch]

    async def _batch(self, problem: Problem, responses: Sequence[Response]) -> list[Any]:
        judge = isinstance(self.options, JudgeOptions)
        try:
            if judge:
                rewards = [self._judged(await self._post(self._question(problem, responses[0])))]
            else:
                asked = [{"problem": asdict(problem), "response": asdict(r)} for r in responses]
                rewards = _rewards(await self._post({"items": asked}), len(responses))
        except (
            aiohttp.ClientError,
            TimeoutError,
            ValueError,
            TypeError,
            KeyError,
            IndexError,
        ) as error:
            said = f"{self.options.url}: {type(error).__name__}: {error}"[:500]
            return [{"cause": "http", "error": said}] * len(responses)
        return [
            [None, r, {}] if isinstance(r, bool) else [r.value, r.correct, dict(r.parts)]
            for r in rewards
        ]

    async def _post(self, body: Mapping[str, Any]) -> Any:
        """The reply's JSON, after as many tries as allowed. Raises aiohttp.ClientError, TimeoutError, ValueError."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=self.options.timeout),
                connector=aiohttp.TCPConnector(limit=0),
                headers={"Content-Type": "application/json", **self._headers},
            )
        data = json.dumps(body, default=str).encode()
        async with self._free:
            for attempt in range(self.options.retries + 1):
                try:
                    async with self._session.post(self.options.url, data=data) as reply:
                        text = await reply.text()
                        if reply.status == 200:
                            return json.loads(text)
                        if reply.status not in RETRIED or attempt == self.options.retries:
                            raise ValueError(f"status {reply.status}: {text[:200]}")
                except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError):
                    if attempt == self.options.retries:
                        raise
                pause = min(LONGEST_PAUSE, self.options.backoff * 2**attempt)
                await asyncio.sleep(pause * (0.5 + random.random() / 2))
        raise AssertionError("unreachable: the last try returns or raises")

    def _question(self, problem: Problem, response: Response) -> dict[str, Any]:
        assert isinstance(self.options, JudgeOptions)
        said = {
            "problem": problem.text,
            "answer": problem.answer,
            "response": after_thought(response.text) or "",
        }
        # One pass: what is put in is never looked into for further marks.
        text = re.sub(r"\{(problem|answer|response)\}", lambda m: said[m[1]], self.options.template)
        return {
            "model": self.options.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            **self.options.request,
        }

    def _judged(self, reply: Any) -> Reward | bool:
        assert isinstance(self.options, JudgeOptions)
        text = after_thought(reply["choices"][0]["message"]["content"] or "") or ""
        matches = list(self._parse.finditer(text))
        if not matches:
            raise ValueError(
                f"parse {self.options.parse!r} finds nothing in the judge's {text[-200:]!r}"
            )
        said = (matches[-1][1] if self._parse.groups else matches[-1][0]).strip()
        verdict = VERDICTS.get(said.lower())
        return as_reward(float(said) / self.options.scale) if verdict is None else verdict


def _rewards(reply: Any, count: int) -> list[Reward | bool]:
    """``{"rewards": [number | {"value", "correct", "parts"}, ...]}``, one per response asked about."""
    rewards = [Reward(**r) if isinstance(r, dict) else r for r in reply["rewards"]]
    if len(rewards) != count:
        raise ValueError(f"{len(rewards)} rewards for {count} responses")
    return [r if isinstance(r, bool) else as_reward(r) for r in rewards]
