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
    """One key. ``name`` is dotted; ``default`` is the schema's (None for required keys and sections). ``is_list``: it
    holds a list of sections, whose keys are named ``a.b[].c``."""

    name: str
    is_section: bool
    required: bool
    type: str
    default: Any
    doc: str
    is_list: bool = False

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


def schema_keys(model: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    """List every key, a section before the keys inside it, in the order of the schema.

    The sections of a list have their keys at ``a.b[].c``. A key that takes a text or such a list (``reward.function``)
    is both a value and that list; where the text may be null too, the keys are those of another key, listed there.
    """
    for field_name, field in model.model_fields.items():
        name = prefix + field_name
        alternatives = typing.get_args(field.annotation)
        section, many = _section_type(field.annotation)
        is_value = section is None or str in alternatives
        required = field.is_required()
        yield Key(
            name=name,
            is_section=not is_value,
            required=required,
            type=_type_text(field) if is_value else "section",
            default=None if required or not is_value else field.get_default(),
            doc=" ".join((field.description or "").split()),
            is_list=many,
        )
        if section and not (is_value and types.NoneType in alternatives):
            yield from schema_keys(section, name + ("[]." if many else "."))


def nearest_key(unknown: str) -> str:
    """Find the valid key whose name is closest to ``unknown``."""
    leaf = unknown.rpartition(".")[2]

    def likeness(key: Key) -> float:
        # The last part counts most: a key is more often put into a wrong section than misspelt beyond recognition.
        by_leaf = difflib.SequenceMatcher(None, leaf, key.leaf).ratio()
        by_leaf += 0.1 * (
            key.leaf in leaf.split("_")
        )  # max_steps is rather steps than max_staleness
        return by_leaf + 0.5 * difflib.SequenceMatcher(None, unknown, key.name).ratio()

    return max(schema_keys(), key=likeness).name


def required_below(section: str) -> list[str]:
    """List the required keys of a section, dotted."""
    return [k.name for k in schema_keys() if k.section == section and k.required]


def _section_type(annotation: Any) -> tuple[type[Section] | None, bool]:
    """Find the section that a key holds, alone or optional, and whether it holds a list of them."""
    for candidate in (annotation, *typing.get_args(annotation)):
        many = typing.get_origin(candidate) is list
        held = typing.get_args(candidate)[0] if many else candidate
        if isinstance(held, type) and issubclass(held, Section):
            return held, many
    return None, False


_NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    list[str]: "list of texts",
    list[float]: "list of numbers",
    dict[str, Any]: "section of any keys",
}
_UNIONS = (types.UnionType, typing.Union)
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def _kind_text(kind: Any) -> str:
    if _section_type(kind)[0]:
        return "list of parts"
    held = typing.get_args(kind)
    if held and typing.get_origin(held[0]) is Literal:
        return "list of " + ", ".join(f"`{value}`" for value in typing.get_args(held[0]))
    return _NAMES[kind]


def _type_text(field: FieldInfo) -> str:
    annotation = field.annotation
    args = typing.get_args(annotation) if typing.get_origin(annotation) in _UNIONS else ()
    nullable = types.NoneType in args
    if typing.get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        (entry,) = typing.get_args(annotation)
        if typing.get_origin(entry) is Literal:
            return "list of " + ", ".join(f"`{value}`" for value in typing.get_args(entry))
    kinds = [arg for arg in args if arg is not types.NoneType] or [annotation]
    text = " or ".join(map(_kind_text, kinds))
    bounds = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in _SIGNS.items()
        if hasattr(limit, name)
    ]
    text += " " + ", ".join(bounds) if bounds else ""
    return text + (" or null" if nullable else "")
