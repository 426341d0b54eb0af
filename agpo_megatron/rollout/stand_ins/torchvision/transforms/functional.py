"""Names that image models import; calling one is an error."""

from typing import Any, NoReturn

from . import InterpolationMode

__all__ = ["InterpolationMode", "pil_to_tensor"]


def pil_to_tensor(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise NotImplementedError("torchvision.transforms.functional: the CPU stand-in has no images")
