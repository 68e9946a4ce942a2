"""The tiny towers that the package brings: where they are, and what was measured when they were made."""

from pathlib import Path

TOWERS = Path(__file__).parent / "towers"
LANGUAGE, VISION, RECORD = "language", "vision", "record.json"
GATED = (
    "answers from captions",
    "answers from text pictures",
    "colour from patches",
    "shape from patches",
    "size from patches",
    "place from patches",
)
"""Figures of the record that are told, in percent; `tiny` makes them and holds them against its gate."""
