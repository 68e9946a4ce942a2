"""The pictures that questions are asked about: the right one, wherever it lies, and a blank one of its size."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from PIL import Image

from components.contract.store import Store
from llava.data.images import BadImage, decode
from llava.errors import LlavaError


@dataclass(frozen=True)
class Picture:
    """A picture by its hash; its bytes are held, or read again where they are needed."""

    sha256: str
    """Of the file's bytes, hex."""
    data: bytes | None = None
    store: Store | None = None
    key: str = ""

    @classmethod
    def of(cls, data: bytes) -> Picture:
        """A picture whose bytes are at hand."""
        return cls(hashlib.sha256(data).hexdigest(), data)

    @classmethod
    def at(cls, store: Store, key: str) -> Picture:
        """The picture at `key`; FileNotFoundError if there is none."""
        return cls(store.sha256(key), None, store, key)

    def open(self) -> Image.Image:
        """Decoded, upright, RGB."""
        data = self.data
        if data is None:
            assert self.store is not None
            data = self.store.read(self.key)
        try:
            return decode(data)
        except BadImage as error:
            raise LlavaError(f"evaluation picture {self.key or self.sha256[:12]}: {error}") from error


def blank(image_processor: Any, size: tuple[int, int]) -> Image.Image:
    """A picture of `size` (width, height) in the image processor's mean colour: nothing to see, nothing unusual."""
    red, green, blue = (round(255 * value) for value in image_processor.image_mean)
    return Image.new("RGB", size, (red, green, blue))
