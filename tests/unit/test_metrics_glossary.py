"""docs/metrics.md explains every metric that the code writes, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from agpo_megatron.observe.exporter import LIVE
from agpo_megatron.observe.metrics import METRIC_KEYS

REPO = Path(__file__).parents[2]
PACKAGE = REPO / "agpo_megatron"
ROW = re.compile(r"^\| `([a-z0-9_/]+)` \| ([^|]+) \| `([a-z]+)` \| ([^|]+) \|$", re.MULTILINE)
GLOSSARY = ROW.findall((REPO / "docs" / "metrics.md").read_text(encoding="utf-8"))
FAMILIES = "|".join(sorted({key.partition("/")[0] for key in METRIC_KEYS if "/" in key}))
WRITTEN = re.compile(rf'"((?:{FAMILIES})/[a-z0-9_]+)"\s*(?::|\]\s*=|,)')
# A duration that the controller compares with the signal's lead; a unit on the progress display.
NOT_A_METRIC = {"time/save", "tokens/s"}


def names_in(room: Path) -> set[str]:
    """Names that the sources of a room use as keys."""
    return {
        name
        for path in room.rglob("*.py")
        for name in WRITTEN.findall(path.read_text(encoding="utf-8"))
    } - NOT_A_METRIC


def test_every_metric_is_explained_once() -> None:
    explained = [name for name, *_ in GLOSSARY]
    assert len(explained) == len(set(explained))
    assert set(explained) == set(METRIC_KEYS)
    assert [room for _, _, room, _ in GLOSSARY if not (PACKAGE / room).is_dir()] == []


def test_every_live_gauge_is_explained() -> None:
    text = (REPO / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name, what in LIVE.items() if f"| `{name}` | {what} |\n" not in text] == []


def test_every_name_in_the_sources_is_explained() -> None:
    used = names_in(PACKAGE)
    assert len(used) > 30
    assert used <= {name for name, *_ in GLOSSARY}
