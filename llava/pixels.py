"""Pictures to pixels, exactly as the checkpoint's stock image processor does it.

The geometry (pad or crop, resize) runs on the CPU and gives uint8; the scaling and normalisation are left
to the device, where they cost nothing and a quarter of the bytes travel.
"""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from llava.choices import Fit

_LONGEST = 4096


def fitted(image_processor: Any, fit: Fit, edge: int) -> Any:
    """A stock image processor for `fit` with the constants of `image_processor`; `edge`: pixels of the tower's side."""
    if fit == "model":
        return image_processor
    kept = {
        name: getattr(image_processor, name)
        for name in ("image_mean", "image_std", "rescale_factor", "resample", "do_rescale", "do_normalize")
    }
    square: dict[str, Any] = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    kind: Any = LlavaImageProcessorPil if fit == "pad" else CLIPImageProcessorPil
    return kind(
        **kept,
        **square,
        do_resize=True,
        do_center_crop=True,
        do_convert_rgb=True,
        **({"do_pad": True} if fit == "pad" else {}),
    )


class Pixels:
    """The geometry and the constants of one image processor."""

    def __init__(self, image_processor: Any):
        self._processor = image_processor
        self._mean = torch.tensor(image_processor.image_mean).view(1, 3, 1, 1)
        self._std = torch.tensor(image_processor.image_std).view(1, 3, 1, 1)
        self._scale = float(image_processor.rescale_factor)
        self._blank: np.ndarray | None = None

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB picture of any size -> (3, H, W) uint8."""
        if getattr(self._processor, "do_pad", False) and max(image.size) > _LONGEST:
            # The canvas is square: for a strip of 60,000 pixels it would take gigabytes.
            image = image.copy()
            image.thumbnail((_LONGEST, _LONGEST))
        return _planes(self._in_pillow(image)) if self._pillow_will_do else self._stock(image)

    @cached_property
    def _pillow_will_do(self) -> bool:
        """Whether Pillow alone gives what the processor gives, tried out on noise of several shapes.

        The processor goes to numpy and back several times, which takes longer than decoding.
        """
        height, width = self.blank().shape[1:]
        random = np.random.default_rng(0)
        for down, across in ((1, 1), (1, 4 / 3), (2.01, 1), (0.36, 0.51), (2.1, 3.02), (3.3, 2.2)):
            shape = (max(1, round(down * height)), max(1, round(across * width)), 3)
            noise = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
            try:
                if not np.array_equal(self._stock(noise), _planes(self._in_pillow(noise))):
                    return False
            except (AttributeError, KeyError, TypeError, ValueError):  # a processor of another kind
                return False
        return True

    def _in_pillow(self, image: Image.Image) -> Image.Image:
        processor = self._processor
        if getattr(processor, "do_pad", False) and image.width != image.height:
            edge = max(image.size)
            colour = tuple(int(255 * value) for value in processor.image_mean)
            canvas = Image.new("RGB", (edge, edge), colour)
            canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
            image = canvas
        if processor.do_resize and (goal := self._goal(image.size)) != image.size:
            image = image.resize(goal, processor.resample)
        if processor.do_center_crop:
            crop = dict(processor.crop_size)
            left, top = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
            image = image.crop((left, top, left + crop["width"], top + crop["height"]))
        return image

    def _goal(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height after resizing."""
        wanted = dict(self._processor.size)
        if not (edge := wanted.get("shortest_edge")):
            return wanted["width"], wanted["height"]
        width, height = size
        if width <= height:
            return edge, int(edge * height / width)
        return int(edge * width / height), edge

    def _stock(self, image: Image.Image) -> np.ndarray:
        out = self._processor(image, do_rescale=False, do_normalize=False, return_tensors="np")[
            "pixel_values"
        ][0]
        return np.ascontiguousarray(out).astype(np.uint8, copy=False)

    def blank(self) -> np.ndarray:
        """A picture of the processor's mean colour, (3, H, W) uint8: it holds nothing to see."""
        if self._blank is None:
            self._blank = self._stock(blank_picture(self._processor))
        return self._blank

    def normalise(self, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(N, 3, H, W) uint8 -> the stock processor's `pixel_values` in `dtype`, on the pixels' device."""
        if self._mean.device != pixels.device:
            self._mean, self._std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return ((pixels.float() * self._scale - self._mean) / self._std).to(dtype)


def _planes(image: Image.Image) -> np.ndarray:
    """(3, H, W) uint8 of an RGB picture. Pillow writes plane by plane within a line, so that whole lines are copied."""
    lines = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8).reshape(image.height, 3, image.width)
    return np.ascontiguousarray(lines.transpose(1, 0, 2))


def blank_picture(image_processor: Any) -> Image.Image:
    """A square picture of the processor's mean colour."""
    red, green, blue = (round(value * 255) for value in image_processor.image_mean)
    size = dict(image_processor.size)
    edge = int(size.get("shortest_edge") or size["height"])
    return Image.new("RGB", (edge, edge), (red, green, blue))
