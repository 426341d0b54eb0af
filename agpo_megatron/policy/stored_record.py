"""Tensors that ``torch.save`` wrote into a stretch of a file, mapped from there: no value is copied.

``torch.load`` with ``weights_only`` reads the record's description, to the meta device: it allows tensors and plain
containers, and calls nothing of the file's choosing.
"""

from __future__ import annotations

from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view


def read_record(path: Path, start: int, length: int) -> Tensor:
    """Map the tensor in bytes [start, start + length) of ``path``, of any shape and strides, on the CPU.

    Writing to it does not change the file. Raises OSError, ValueError or RuntimeError for a damaged or hostile record.
    """
    with path.open("rb") as file:
        record = cast("IO[bytes]", _create_file_view(file, start, length))
        try:
            described = torch.load(record, map_location="meta", weights_only=True)
        except UnpicklingError as error:
            raise ValueError("it describes more than tensors, which is never loaded") from error
        if not isinstance(described, Tensor):
            raise ValueError(f"a {type(described).__name__} is no tensor")
        values = described.detach()
        storage = values.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes == 0:
            return torch.empty(values.shape, dtype=values.dtype)
        at = storage._checkpoint_offset  # set by torch.load: where the values begin in the record
        if at is None or at + nbytes > length:
            raise ValueError("its values reach beyond the record")
        first = (start + at) // ALLOCATIONGRANULARITY * ALLOCATIONGRANULARITY
        skipped = start + at - first
        window = mmap(file.fileno(), skipped + nbytes, access=ACCESS_COPY, offset=first)
    stored = torch.frombuffer(window, dtype=torch.uint8, offset=skipped, count=nbytes)
    if stored.data_ptr() % values.dtype.itemsize:
        stored = stored.clone()
    return stored.view(values.dtype).as_strided(
        values.shape, values.stride(), values.storage_offset()
    )
