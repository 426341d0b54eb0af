"""A trainer rank's end of the command channel (protocol: controller/trainer_client.py)."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import requests

from agpo_megatron.wait import current_phase, last_finished

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 2.0


@dataclass(frozen=True)
class Command:
    attempt: int
    seq: int
    name: str
    args: dict[str, Any]


class ControllerLost(RuntimeError):
    """The controller could not be reached for the configured time."""


class Channel:
    """Authenticated JSON requests to the controller, retried for ``patience`` seconds while it is away."""

    def __init__(self, url: str, token: str, rank: int, patience: float) -> None:
        self.rank = rank
        self._url, self._patience = url, patience
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {token}"
        self._session.trust_env = False  # no proxy between the roles of one run

    def _request(self, method: str, path: str, timeout: float, **kwargs: Any) -> requests.Response:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                response = self._session.request(
                    method, self._url + path, timeout=timeout, **kwargs
                )
                response.raise_for_status()
                return response
            except (requests.ConnectionError, requests.Timeout) as error:
                if time.monotonic() > deadline:
                    raise ControllerLost(
                        f"rank {self.rank}: no answer from the controller at {self._url} "
                        f"for {self._patience:.0f} s ({error})"
                    ) from error
                time.sleep(0.2)

    def next_command(self, attempt: int, after: int) -> Command | None:
        """Wait for the command after number ``after`` of ``attempt``, or the first of a newer one; None when the
        long poll ended without one."""
        response = self._request("GET", f"/command?attempt={attempt}&after={after}", timeout=60)
        return None if response.status_code == 204 else Command(**response.json())

    def deliver(self, command: Command, results: list[dict[str, Any]]) -> None:
        body = {"attempt": command.attempt, "seq": command.seq, "results": results}
        # Not as json=body: requests refuses a loss that is not a number, which the controller is to hear of.
        kind = {"Content-Type": "application/json"}
        self._request("POST", "/result", timeout=60, data=json.dumps(body), headers=kind)

    def report_failure(self, command: str, error: str) -> None:
        """Report an error to the controller if it can be reached: the exit code tells the supervisor in any case."""
        try:
            body: dict[str, Any] = {"rank": self.rank, "command": command, "error": error}
            self._session.post(self._url + "/failure", json=body, timeout=5)
        except requests.RequestException as failure:
            log.warning("could not report the failure to the controller: %s", failure)

    def start_heartbeat(self, device_bytes: Callable[[], int] = lambda: 0) -> None:
        """Tell the controller this rank's phase from a thread; end the process when the controller is lost.

        ``device_bytes``: returns the most device memory that was allocated so far."""
        arguments = (device_bytes,)
        threading.Thread(target=self._beat, args=arguments, name="heartbeat", daemon=True).start()

    def _beat(self, device_bytes: Callable[[], int]) -> None:
        session = requests.Session()
        session.headers.update(self._session.headers)
        session.trust_env = False
        last_answer = time.monotonic()
        while True:
            phase = current_phase()
            body: dict[str, Any] = {
                "rank": self.rank,
                "phase": phase.name,
                "since": phase.since,
                "last": last_finished(),
                "device_bytes": device_bytes(),
            }
            try:
                session.post(self._url + "/heartbeat", json=body, timeout=5).raise_for_status()
                last_answer = time.monotonic()
            except requests.RequestException as error:
                if time.monotonic() - last_answer > self._patience:
                    log.error("rank %d: controller lost (%s); leaving", self.rank, error)
                    os._exit(3)
            time.sleep(HEARTBEAT_SECONDS)
