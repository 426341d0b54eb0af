"""YAML as this project reads and writes it: the YAML 1.2 core schema, duplicate keys refused.

PyYAML follows YAML 1.1, in which ``1e-4`` is a string, ``yes`` a boolean, ``010`` eight and ``1:30`` ninety. A
configuration file must mean what it looks like, so scalars resolve here as in YAML 1.2 (chapter 10.3).
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from .errors import ConfigError


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would read as something else than text."""


_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?[0-9]+$")
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(~|null|Null|NULL|)$")
# Order matters: the first pattern that matches gives the type, and every integer also looks like a float.
for _tag, _pattern, _first in (
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", _NULL, ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def parse_yaml(text: str, source: str) -> tuple[Any, dict[str, int]]:
    """Parse a YAML document: its value, and the line (from 1) of every key, by dotted name.

    ``source`` names the text in messages. Raises ConfigError on a syntax error, a key written twice, or a key that
    is not text.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[str, int] = {}
        _walk_keys(node, "", source, lines)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"{place}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    finally:
        loader.dispose()


def yaml_line(key: str, value: Any) -> str:
    """Format ``key: value`` on one line, in a form that ``parse_yaml`` reads back to the same value."""
    if isinstance(value, list) and not all(isinstance(entry, str) for entry in value):
        return f"{key}: {json.dumps(value, ensure_ascii=False)}"  # JSON is YAML
    # Line breaks of any alphabet, and other signs that do not print, keep to one line only when escaped.
    quoted = isinstance(value, list) or (isinstance(value, str) and not value.isprintable())
    text: str = yaml.dump(
        value if quoted else {key: value},
        Dumper=_Dumper,
        default_style='"' if quoted else None,
        default_flow_style=quoted,
        allow_unicode=True,
        width=float("inf"),
    )
    return f"{key}: {text.rstrip()}" if quoted else text.rstrip("\n")


def _walk_keys(node: yaml.Node, prefix: str, source: str, lines: dict[str, int]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{source}:{line}: keys must be text, not {key_node.value!r}")
        name = prefix + key_node.value
        if name in lines:
            raise ConfigError(
                f"{source}:{line}: {name} is written twice (first in line {lines[name]}); remove one"
            )
        lines[name] = line
        _walk_keys(value_node, name + ".", source, lines)
