"""The concept-balanced filter: of captions that say the same again and again, some; of rare concepts, all."""

from components.filter.component import Filter
from components.filter.settings import FilterSettings

__all__ = ["Filter", "FilterSettings"]
