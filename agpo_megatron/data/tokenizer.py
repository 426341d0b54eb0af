"""The tokenizer of a Hugging Face checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_tokenizer(folder: str) -> Any:
    """A transformers tokenizer. Raises FileNotFoundError naming what the folder lacks; never asks a hub."""
    path = Path(folder)
    if not (path / "tokenizer_config.json").exists() and not (path / "tokenizer.json").exists():
        raise FileNotFoundError(
            f"no tokenizer in {path}: it needs tokenizer.json or tokenizer_config.json; "
            "copy them from the model's original folder"
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
