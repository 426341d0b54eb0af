"""The run for Prometheus: ``GET /metrics`` on the controller, with the last step's metrics and gauges of this moment.

Anyone who reaches the port may read it. It is served by the controller's own event loop, so that what it reads does not
change under it. ``launch/grafana.json`` is a dashboard of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from agpo_megatron.observe.metrics import METRIC_FAMILIES, METRIC_KEYS
from agpo_megatron.observe.writers import Row

LIVE = {
    "agpo_live_phase_seconds": "for how long a role has been doing, or waiting for, this (labels role, phase)",
    "agpo_live_heartbeat_age_seconds": "since a trainer rank was heard (label rank)",
    "agpo_live_busy_seconds_total": "seconds that a role was busy since this start; its rate is the busy share (label "
    "role: trainer, servers (mean over them), rewards)",
    "agpo_live_samples_in_flight": "samples in flight on a server (label server)",
    "agpo_live_samples_waiting": "requests that wait for room on a server",
    "agpo_live_server_state": "1 for the state that a server is in, 0 for the others (labels server, state)",
    "agpo_live_dispatch_open": "1 while servers are given requests, 0 while a publish holds them",
    "agpo_live_window_ready_groups": "finished groups that no batch has taken",
    "agpo_live_window_open_groups": "groups that are begun and not finished",
    "agpo_live_memory_bytes": "host memory of a role with its children, resident, largest process tree (label role)",
    "agpo_live_device_memory_bytes": "device memory of a trainer rank, highest since its start (label rank)",
}
"""Gauges (and a counter) of the moment -> their meaning."""


@dataclass(frozen=True)
class Reading:
    """One value of a metric of ``LIVE``."""

    name: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)


class ExporterError(OSError):
    """The port cannot be had."""


def metric_name(key: str) -> str:
    """Name of a key of METRIC_KEYS in Prometheus: ``reward/mean`` is ``agpo_reward_mean``."""
    return "agpo_" + key.replace("/", "_")


class Exporter:
    """The steps' side is a writer (``write``); ``live`` reads the moment."""

    def __init__(self, live: Callable[[], Iterable[Reading]], recorded: Iterable[Row]) -> None:
        self._live, self._last = live, dict[str, float]()
        for row in recorded:
            self.write(row)
        self._registry = CollectorRegistry()
        self._registry.register(self)  # type: ignore[arg-type]

    def write(self, row: Row) -> None:
        """Take a step; a metric that it lacks (it stands with another update of its batch) keeps its value."""
        self._last.update(row)

    def close(self) -> None:
        pass

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus-client."""
        for key in METRIC_KEYS:
            if key in self._last:
                doc = f"{key} of the last step, see docs/metrics.md"
                yield GaugeMetricFamily(metric_name(key), doc, value=self._last[key])
        for family in METRIC_FAMILIES:
            name = metric_name(family.rstrip("/"))
            gauge = GaugeMetricFamily(name, f"{family}NAME of the last step", labels=["name"])
            for key, value in self._last.items():
                if key.startswith(family):
                    gauge.add_metric([key.removeprefix(family)], value)
            yield gauge
        yield from self._moment()

    def _moment(self) -> Iterator[Metric]:
        found: dict[str, list[Reading]] = {}
        for reading in self._live():
            found.setdefault(reading.name, []).append(reading)
        for name, readings in found.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = kind(name, LIVE[name], labels=list(readings[0].labels))
            for reading in readings:
                metric.add_metric(list(reading.labels.values()), reading.value)
            yield metric


@asynccontextmanager
async def served(exporter: Exporter, port: int) -> AsyncIterator[None]:
    """Answer ``GET /metrics`` on ``port`` of every interface. Raises ExporterError when the port is taken."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=exporter.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/metrics", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, None, port, reuse_address=True).start()
        except OSError as error:
            raise ExporterError(
                f"observe.prometheus_port {port}: {error.strerror}; set it to a free port, or to 0"
            ) from None
        yield
    finally:
        await runner.cleanup()
