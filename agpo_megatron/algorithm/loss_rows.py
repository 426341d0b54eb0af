"""The rows of a micro-batch: trained tokens with what is known of each, the inputs of its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agpo_megatron.samples import DEFAULTS


@dataclass(frozen=True)
class LossRows:
    """The N rows (trained tokens) of one packed micro-batch of S whole sequences, with their columns.

    ``per_token`` [N], ``per_sequence`` [S]: the known ones of samples.COLUMNS, by name, fp32. ``sequence`` [N] int64 in
    [0, S): the sequence of each row; all trained rows of a sequence are here. ``gains`` [S] fp32 or None: factors on
    the policy loss of whole sequences, where the gate is decided before the forward pass.
    """

    per_token: Mapping[str, Tensor]
    per_sequence: Mapping[str, Tensor]
    sequence: Tensor
    sequences: int
    gains: Tensor | None = None

    def column(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a column for each row, [N]; its default where no sequence has it."""
        if name in self.per_token:
            return self.per_token[name].to(dtype)
        if name in self.per_sequence:
            return self.per_sequence[name][self.sequence].to(dtype)
        return torch.full_like(self.sequence, DEFAULTS[name], dtype=dtype)

    def part(self, rows: slice | Tensor) -> LossRows:
        """Select some of the rows; sequences keep their numbers."""
        cut = {name: values[rows] for name, values in self.per_token.items()}
        return replace(self, per_token=cut, sequence=self.sequence[rows])

    def to(self, device: torch.device) -> LossRows:
        def there(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return LossRows(
            {name: there(values) for name, values in self.per_token.items()},
            {name: there(values) for name, values in self.per_sequence.items()},
            there(self.sequence),
            self.sequences,
            None if self.gains is None else there(self.gains),
        )
