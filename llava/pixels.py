"""Pictures to pixels, exactly as the checkpoint's stock image processor does it.

The geometry (pad or crop, resize) runs on the CPU and gives uint8; the scaling and normalisation are left
to the device, where they cost nothing and a quarter of the bytes travel.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image


class Pixels:
    """The geometry and the constants of one image processor."""

    def __init__(self, image_processor: Any):
        self._processor = image_processor
        self.mean = list(image_processor.image_mean)
        self.std = list(image_processor.image_std)
        self.scale = float(image_processor.rescale_factor)
        self._blank: np.ndarray | None = None

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB picture of any size -> (3, H, W) uint8."""
        out = self._processor(image, do_rescale=False, do_normalize=False, return_tensors="np")[
            "pixel_values"
        ][0]
        return np.ascontiguousarray(out).astype(np.uint8, copy=False)

    def blank(self) -> np.ndarray:
        """A picture of the processor's mean colour, (3, H, W) uint8: it holds nothing to see."""
        if self._blank is None:
            self._blank = self(blank_picture(self._processor))
        return self._blank

    def normalise(self, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(N, 3, H, W) uint8 -> the stock processor's `pixel_values` in `dtype`."""
        mean = torch.tensor(self.mean, device=pixels.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(1, 3, 1, 1)
        return ((pixels.float() * self.scale - mean) / std).to(dtype)


def blank_picture(image_processor: Any) -> Image.Image:
    """A square picture of the processor's mean colour."""
    red, green, blue = (round(value * 255) for value in image_processor.image_mean)
    size = dict(image_processor.size)
    edge = int(size.get("shortest_edge") or size["height"])
    return Image.new("RGB", (edge, edge), (red, green, blue))
