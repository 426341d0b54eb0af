"""Every key the schema knows, as data: for error messages, provenance and the written reference."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic.fields import FieldInfo

from agpo_megatron.algorithm.settings import Section

from .schema import Config


@dataclass(frozen=True)
class Key:
    """One key. ``name`` is dotted; ``default`` is the schema's (None for required keys and sections)."""

    name: str
    is_section: bool
    required: bool
    type: str
    default: Any
    doc: str

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


def schema_keys(model: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    """List every key, a section before the keys inside it, in the order of the schema."""
    for field_name, field in model.model_fields.items():
        name, section = prefix + field_name, _section_type(field.annotation)
        required = field.is_required()
        yield Key(
            name=name,
            is_section=section is not None,
            required=required,
            type="section" if section else _type_text(field),
            default=None if required or section else field.get_default(),
            doc=" ".join((field.description or "").split()),
        )
        if section:
            yield from schema_keys(section, name + ".")


def nearest_key(unknown: str) -> str:
    """Find the valid key whose name is closest to ``unknown``."""
    leaf = unknown.rpartition(".")[2]

    def likeness(key: Key) -> float:
        # The last part counts most: a key is more often put into a wrong section than misspelt beyond recognition.
        by_leaf = difflib.SequenceMatcher(None, leaf, key.leaf).ratio()
        return by_leaf + 0.5 * difflib.SequenceMatcher(None, unknown, key.name).ratio()

    return max(schema_keys(), key=likeness).name


def required_below(section: str) -> list[str]:
    """List the required keys of a section, dotted."""
    return [k.name for k in schema_keys() if k.section == section and k.required]


def _section_type(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


_NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    list[str]: "list of texts",
}
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def _type_text(field: FieldInfo) -> str:
    annotation = field.annotation
    args = typing.get_args(annotation)
    nullable = types.NoneType in args
    if typing.get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if nullable:
        (annotation,) = (arg for arg in args if arg is not types.NoneType)
    text = _NAMES[annotation]
    bounds = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in _SIGNS.items()
        if hasattr(limit, name)
    ]
    text += " " + ", ".join(bounds) if bounds else ""
    return text + (" or null" if nullable else "")
