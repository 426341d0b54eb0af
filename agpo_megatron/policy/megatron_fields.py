"""Fields of TransformerConfig that ``policy.megatron`` gives: which there are, and of which type.

``python -m agpo_megatron.policy.megatron_fields FIELDS``: FIELDS is JSON; a JSON list of what is wrong is printed.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import sys
import typing
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError


def given_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields as TransformerConfig takes them: names of an enumeration become its members.

    Raises ValueError for a field that the installed megatron-core does not have, and for a value of another type.
    """
    if not fields:
        return {}
    if wrong := list(problems(fields)):
        raise ValueError("; ".join(wrong))
    hints = typing.get_type_hints(TransformerConfig)
    return {name: _member(hints[name], value) for name, value in fields.items()}


def problems(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with each field, by its key."""
    hints = typing.get_type_hints(TransformerConfig)
    known = [field.name for field in dataclasses.fields(TransformerConfig)]
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            yield f"policy.megatron.{name}: megatron-core has no such field; nearest: {near[0]}"
            continue
        try:
            adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True))
            adapter.validate_python(_member(hints[name], value), strict=True)
        except ValidationError as error:
            wish = error.errors()[0]["msg"].replace("Input should be", "must be", 1)
            names = f" ({', '.join(hints[name].__members__)})" if _is_enum(hints[name]) else ""
            yield f"policy.megatron.{name}: {wish}{names}, not {value!r}"


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _member(hint: Any, value: Any) -> Any:
    """YAML knows no enumerations: their members are given by name."""
    return hint.__members__.get(value, value) if _is_enum(hint) else value


def main() -> None:
    sys.stdout.write("\n" + json.dumps(list(problems(json.loads(sys.argv[1])))) + "\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
