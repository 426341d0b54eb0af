"""Every parameter of one model, both ways: the architecture's table with the model's sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.shape import ModelShape
from agpo_megatron.conversion.tables import Place, Rule, architecture_of


class WeightMap:
    """The table of one model with its sizes: every parameter, both ways.

    ``config``: the content of ``config.json``. Raises ConversionError as ``architecture_of`` and
    ``ModelShape.from_hf``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.architecture = architecture_of(config)
        self.shape = ModelShape.from_hf(config)
        self._by_name: dict[str, Rule] = {}
        for rule in [*self.rules(), *self._tied_head()]:
            self._by_name[rule.megatron] = rule
            if rule.te_name:
                self._by_name[rule.te_name] = rule

    def stage_rules(self, layers: Iterable[int], first: bool, last: bool) -> Iterator[Rule]:
        """Rules of one pipeline stage in publishing order, with global layer numbers.

        Embedding on the first stage, the given layers in the given order, final norm and head on the last. A tied head
        has no tensor of its own: the embedding stands for it.
        """
        table = self.architecture.rules
        if first:
            yield from (rule for rule in table if rule.place is Place.EMBEDDING)
        for layer in layers:
            if not 0 <= layer < self.shape.layers:
                raise ConversionError(f"layer {layer} is outside 0..{self.shape.layers - 1}")
            for rule in table:
                if rule.place is Place.LAYER:
                    yield from self._of_layer(rule, layer)
        if last:
            yield from (rule for rule in table if rule.place is Place.FINAL_NORM)
            if not self.shape.tied:
                yield from (rule for rule in table if rule.place is Place.HEAD)

    def _of_layer(self, rule: Rule, layer: int) -> Iterator[Rule]:
        if not rule.per_expert:
            yield rule.at(layer)
            return
        assert self.shape.experts is not None
        yield from (rule.at(layer, expert) for expert in range(self.shape.experts.count))

    def rules(self) -> Iterator[Rule]:
        """Every rule of the model in publishing order: each Hugging Face tensor exactly once."""
        return self.stage_rules(range(self.shape.layers), first=True, last=True)

    def for_megatron(self, name: str) -> Rule:
        """The rule of a Megatron parameter, by its name with global layer and expert numbers, as either spec has it.

        With tied embeddings the ``output_layer.weight`` that Megatron keeps on a last stage without the embedding is
        made of the embedding. Raises ConversionError naming a parameter that no rule covers.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise ConversionError(
                f"{self.architecture.name}: no rule covers the Megatron parameter {name!r}"
            ) from None

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every Hugging Face tensor, in publishing order."""
        return {t.name: self.shape.sizes(t.dims) for rule in self.rules() for t in rule.hf}

    def check_hf(self, stored: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a checkpoint whose tensors (name -> shape) are not exactly those of the table.

        Recomputed buffers, and the copy of the embedding that some tied checkpoints keep as their head, may be there.
        Raises ConversionError naming what is missing, unmapped or misshapen.
        """
        expected = self.hf_shapes()
        missing = [name for name in expected if name not in stored]
        if missing:
            raise ConversionError(
                f"the checkpoint lacks {_some(missing)}, which {self.architecture.name} needs"
            )
        optional = {copy for copy, _ in self.tied_copies()}
        unmapped = [
            name
            for name in stored
            if name not in expected
            and name not in optional
            and not any(re.fullmatch(pattern, name) for pattern in self.architecture.derived)
        ]
        if unmapped:
            raise ConversionError(
                f"the checkpoint holds {_some(unmapped)}, which no rule of {self.architecture.name} covers"
            )
        for name, shape in expected.items():
            if tuple(stored[name]) != shape:
                raise ConversionError(
                    f"{name} has shape {list(stored[name])}, but config.json asks for {list(shape)}"
                )

    def tied_copies(self) -> list[tuple[str, str]]:
        """List the (head name, embedding name) pairs that hold the same values when embeddings are tied."""
        return [
            (mine.name, tied.name)
            for rule, head in zip(self._table_head(), self._tied_head(), strict=False)
            for mine, tied in zip(rule.hf, head.hf, strict=True)
        ]

    def _table_head(self) -> list[Rule]:
        return [rule for rule in self.architecture.rules if rule.place is Place.HEAD]

    def _tied_head(self) -> list[Rule]:
        if not self.shape.tied:
            return []
        embedding = next(r for r in self.architecture.rules if r.place is Place.EMBEDDING)
        return [replace(rule, hf=embedding.hf) for rule in self._table_head()]


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
