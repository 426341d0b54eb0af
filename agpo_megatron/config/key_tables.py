"""Writes the configuration reference (docs/configuration.md) from the schema.

``python -m agpo_megatron.config.key_tables docs/configuration.md``
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from agpo_megatron.algorithm.presets import DEFAULT_PRESET, PRESETS, preset_keys

from .keys import Key, schema_keys
from .yaml_core import yaml_line

_INTRO = """\
# Configuration reference

Generated from `agpo_megatron/config/schema.py` by `python -m agpo_megatron.config.key_tables docs/configuration.md`;
a test compares the two.

One YAML file per run. Unknown keys are errors. `--set a.b=c` overrides a key (`c` is YAML), `--run-dir DIR` overrides
`run.dir`, and `{run_dir}` inside any text stands for the run folder. Numbers follow YAML 1.2, so `1e-4` is a number.
`agpo-megatron check CONFIG` prints every value and what set it: default, preset, file or `--set`.
"""


def configuration_reference() -> str:
    """Format the whole page, in Markdown."""
    keys = list(schema_keys())
    count = sum(not key.is_section for key in keys)
    lines = [_INTRO.rstrip("\n"), "", f"{count} keys.", "", "## Top level", "", *_table(keys, "")]
    for section in keys:
        if section.is_section or section.is_list:
            name = section.name + ("[]" if section.is_list else "")
            rows = _table(keys, name)
            if rows:
                lines += ["", f"## `{name}`", "", section.doc.replace("``", "`"), "", *rows]
        if section.name == "algorithm":
            lines += ["", *_preset_table()]
    return "\n".join(lines) + "\n"


def _table(keys: list[Key], section: str) -> list[str]:
    rows = [_row(key) for key in keys if key.section == section and not key.is_section]
    head = ["| key | type | default | meaning |", "|---|---|---|---|"]
    return head + rows if rows else []


def _row(key: Key) -> str:
    if key.required:
        default = "**required**"
    elif key.name in preset_keys(DEFAULT_PRESET):
        default = "by preset"
    else:
        default = f"`{_value(key.default)}`"
    kind = key.type.replace("|", "\\|")
    doc = key.doc.replace("``", "`").replace("|", "\\|")
    return f"| `{key.name}` | {kind} | {default} | {doc} |"


def _preset_table() -> Iterator[str]:
    keys = list(preset_keys(DEFAULT_PRESET))
    yield "What the presets set below `algorithm` (a key written in the file or with `--set` wins):"
    yield ""
    yield "| preset | " + " | ".join(f"`{key.removeprefix('algorithm.')}`" for key in keys) + " |"
    yield "|---|" + "---|" * len(keys)
    for name in PRESETS:
        values = " | ".join(f"`{_value(preset_keys(name)[key])}`" for key in keys)
        yield f"| `{name}` | {values} |"


def _value(value: object) -> str:
    return yaml_line("key", value).removeprefix("key: ").replace("''", '""')


def main() -> None:
    """Write the page to the file named on the command line."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m agpo_megatron.config.key_tables docs/configuration.md")
    Path(sys.argv[1]).write_text(configuration_reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
