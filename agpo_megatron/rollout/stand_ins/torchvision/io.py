"""Names that ``transformers.image_utils`` imports; calling one is an error."""

from enum import Enum
from typing import Any, NoReturn


class ImageReadMode(Enum):
    RGB = "RGB"


def decode_image(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise NotImplementedError("torchvision.io.decode_image: the CPU stand-in decodes no images")
