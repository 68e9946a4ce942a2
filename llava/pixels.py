"""Pictures to pixels, exactly as the checkpoint's stock image processor does it.

The geometry (pad or crop, resize) runs on the CPU and gives uint8; the scaling and normalisation are left
to the device, where they cost nothing and a quarter of the bytes travel.
"""

from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

_LONGEST = 4096

Fit = Literal["model", "pad", "crop"]
"""How a picture becomes a square: as the model's folder says; padded with the mean colour (v1.5, section 3.3); its
middle (v1)."""


def fitted(image_processor: Any, fit: Fit, edge: int) -> Any:
    """A stock image processor for `fit` with the constants of `image_processor`; `edge`: pixels of the tower's side."""
    if fit == "model":
        return image_processor
    kept = {
        name: getattr(image_processor, name)
        for name in ("image_mean", "image_std", "rescale_factor", "resample", "do_rescale", "do_normalize")
    }
    square = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    kind = LlavaImageProcessorPil if fit == "pad" else CLIPImageProcessorPil
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
        if image.size == self._left_alone:
            return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
        return self._stock(image)

    @cached_property
    def _left_alone(self) -> tuple[int, int] | None:
        """The size of pictures that the processor gives back as they are, tried out: it takes longer than decoding."""
        height, width = self.blank().shape[1:]
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        same = np.array_equal(self._stock(Image.fromarray(noise)), noise.transpose(2, 0, 1))
        return (width, height) if same else None

    def _stock(self, image: Image.Image) -> np.ndarray:
        if getattr(self._processor, "do_pad", False) and max(image.size) > _LONGEST:
            # The canvas is square: for a strip of 60,000 pixels it would take gigabytes.
            image = image.copy()
            image.thumbnail((_LONGEST, _LONGEST))
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


def blank_picture(image_processor: Any) -> Image.Image:
    """A square picture of the processor's mean colour."""
    red, green, blue = (round(value * 255) for value in image_processor.image_mean)
    size = dict(image_processor.size)
    edge = int(size.get("shortest_edge") or size["height"])
    return Image.new("RGB", (edge, edge), (red, green, blue))
