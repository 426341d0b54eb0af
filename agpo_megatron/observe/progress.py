"""Live progress of a run for the person watching: a rich display on a terminal, plain single lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BLOCKS = "▁▂▃▄▅▆▇█"
_TREND = 40  # steps shown in a trend line
_PLAIN_LINES = 100  # lines a whole run prints, about, when it is not on a terminal
_ACTIVITIES = {
    "generation": ("time/rollout",),
    "training": ("time/score", "time/update"),
    "publishing": ("time/publish",),
}
"""The things that a batch may spend its time on, or wait for."""


class Progress:
    """Shows step, accuracy, response tokens, loss and clip gate, throughput, bottleneck and the current phase.

    ``metrics`` of ``step`` are those of ``observe.metrics``; a key that is absent is shown as a dash. On anything
    but a terminal a step is one line (of long runs, every so many steps) and phases are not shown. ``updates``: steps
    of a batch. A context manager.
    """

    def __init__(
        self, total_steps: int, title: str, console: Console | None = None, updates: int = 1
    ) -> None:
        self._total, self._title, self._updates = total_steps, title, updates
        self._every = max(1, total_steps // _PLAIN_LINES)  # long runs: a log, not a flood
        self._console = console or Console()
        self._history: list[Mapping[str, float]] = []
        self._batch: list[Mapping[str, float]] = []  # its steps so far
        self._phase, self._since = "start", time.monotonic()
        self._live: Live | None = None
        if self._console.is_terminal:
            # Live redraws from __rich__ twice a second, so the phase's clock runs between calls.
            self._live = Live(
                self, console=self._console, refresh_per_second=2, redirect_stderr=True
            )
            self._live.start()
        else:
            self._line(f"{title}: {total_steps} steps")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def phase(self, name: str) -> None:
        """Show what the run is doing now ("rollout", "update", ...)."""
        self._phase, self._since = name, time.monotonic()

    def step(self, metrics: Mapping[str, float]) -> None:
        """Show a finished step."""
        # Metrics of a whole batch stand with its first step; they are shown with the others too.
        first = not self._history or metrics["step"] % self._updates == 1 % self._updates
        self._batch = [metrics] if first else [*self._batch, metrics]
        shown = {**({} if first else self._history[-1]), **metrics}
        self._history.append(shown)
        if self._live:
            self._live.refresh()
        elif len(self._history) % self._every == 0 or metrics["step"] == self._total:
            self._line(plain_line(shown, self._total, bottleneck(self._batch)))

    def close(self) -> None:
        """Leave the last state on the screen. Harmless when closed already."""
        if self._live:
            self._phase, self._since = "done", time.monotonic()
            self._live.stop()
            self._live = None

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __rich__(self) -> RenderableType:
        last = self._history[-1] if self._history else {}
        done = int(last.get("step", 0))
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(
            f"step [bold]{done}[/]/{self._total}",
            ProgressBar(total=max(self._total, 1), completed=done),
            self._remaining(done),
        )
        phase = Text.assemble(
            (f"{self._phase} ", "cyan"), (f"{time.monotonic() - self._since:.0f} s", "dim")
        )
        return Panel(
            Group(head, "", self._numbers(last), "", phase),
            title=f"[bold]{self._title}[/]",
            title_align="left",
            box=box.ROUNDED,
            border_style="blue",
        )

    def _numbers(self, last: Mapping[str, float]) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(justify="right", style="bold")
        table.add_column(style="green")
        for label, key, form in (
            ("accuracy", "reward/accuracy", ".1%"),
            ("response tokens", "response/tokens_mean", ".1f"),
            ("tokens, correct", "response/tokens_correct_mean", ".1f"),
            ("entropy", "policy/entropy", ".3f"),
        ):
            values = [row.get(key, math.nan) for row in self._history[-_TREND:]]
            table.add_row(label, _number(last.get(key), form), sparkline(values))
        gate = _gate(last)
        style = {"closed": "yellow", "open": "green"}.get(gate, "dim")
        table.add_row("loss", _number(last.get("loss/policy"), "+.4f"), Text(gate, style=style))
        slowest = Text(bottleneck(self._batch), style="cyan")
        if fired := _guards(last).strip():
            table.add_row("guards", "", Text(fired, style="red"))
        table.add_row("tokens/s", _number(last.get("throughput/tokens_per_s"), ".0f"), slowest)
        return table

    def _remaining(self, done: int) -> str:
        times = [
            t for row in self._history[-10:] if not math.isnan(t := row.get("time/step", math.nan))
        ]
        if not times or done >= self._total:
            return ""
        seconds = int((self._total - done) * sum(times) / len(times))
        clock = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        return f"{sum(times) / len(times):.1f} s/step, {clock} left"


def plain_line(metrics: Mapping[str, float], total_steps: int, slowest: str = "") -> str:
    """Format one step as a line of a log. Supervised steps have no answers, so nothing is said of them.

    ``slowest``: the bottleneck.
    """
    width, gate = len(str(total_steps)), _gate(metrics)
    get = metrics.get
    answers = (
        f"  accuracy {_number(get('reward/accuracy'), '.3f')}"
        f"  tokens {_number(get('response/tokens_mean'), '.1f')}"
        f" (correct {_number(get('response/tokens_correct_mean'), '.1f')})"
    )
    return (
        f"step {int(metrics['step']):>{width}}/{total_steps}"
        f"{answers if 'reward/accuracy' in metrics else ''}"
        f"  loss {_number(get('loss/policy'), '+.4f')}"
        f"{gate and f' gate {gate}'}"
        f"  {_number(get('throughput/tokens_per_s'), '.0f')} tok/s"
        f"  {_number(get('time/step'), '.1f')} s"
        f"{slowest and f' ({slowest})'}"
        f"{_guards(metrics)}"
    )


def bottleneck(batch: Sequence[Mapping[str, float]]) -> str:
    """Name what most of the time of a batch's steps went to, with its share: generation (waiting for groups), training
    (scores and updates) or publishing; "" where that is not recorded."""

    def total(*keys: str) -> float:
        values = (row.get(key, 0.0) for row in batch for key in keys)
        return sum(value for value in values if math.isfinite(value))

    taken = {name: total(*keys) for name, keys in _ACTIVITIES.items()}
    slowest = max(taken, key=lambda name: taken[name])
    whole = total("time/step")
    return f"{slowest} {taken[slowest] / whole:.0%}" if whole and taken[slowest] else ""


def sparkline(values: Sequence[float]) -> str:
    """Draw a trend in block characters, scaled to its own range; NaN is a space."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(_BLOCKS) - 1
    return "".join(
        _BLOCKS[round((v - low) / span * top) if span else top // 2] if math.isfinite(v) else " "
        for v in values
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _guards(metrics: Mapping[str, float]) -> str:
    """Say that a guard fired in this step, and how many steps guards have skipped so far; "" where neither."""
    fired, skipped = metrics.get("guard/fired", 0.0), metrics.get("guard/skipped_steps", 0.0)
    return (
        f"  guards {'fired' if fired else 'quiet'}, {skipped:.0f} skipped"
        if fired or skipped
        else ""
    )


def _gate(metrics: Mapping[str, float]) -> str:
    """Say what the clip did in this step; "" where there is none."""
    gate = metrics.get("loss/clip_gate", math.nan)
    return "" if math.isnan(gate) else "open" if gate > 0 else "closed"
