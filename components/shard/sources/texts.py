"""Texts of unknown origin: what no dataset can hold is left out or refused, always under a reason.

| text | a caption among others | a turn, the id, the only caption |
|---|---|---|
| half of a surrogate pair, bytes that are no UTF-8 | left out, counted `text-not-unicode` | sample refused |
| a NUL character | left out, counted `text-nul` | sample refused |
| more than `shard.max_text` characters | left out, counted `text-too-long` | sample refused |
| `<image>`, `</s>` and the like | kept: ordinary text, never a slot or a special token | kept |
| nothing but white space | left out | caption: sample refused, `no-caption`; turn: kept |
"""

from __future__ import annotations

from collections.abc import Iterator

from components.shard.source_settings import SourceSettings
from components.shard.sources.base import Loaded, Outcome, RefusedSample
from llava.data.schema import Row

_LONGEST_ID = 1024


def fault_of(text: str, longest: int) -> str | None:
    """The reason not to let `text` in, or None."""
    if len(text) > longest:
        return "text-too-long"
    if "\0" in text:
        return "text-nul"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "text-not-unicode"
    return None


def checked(settings: SourceSettings, outcome: Outcome) -> Outcome:
    """The outcome without texts that cannot be kept; a refused sample where nothing to learn from is left."""
    if isinstance(outcome, RefusedSample):
        return outcome
    row = outcome.row
    for where, text, longest in _must_be_good(row, settings.max_text):
        if reason := fault_of(text, longest):
            return RefusedSample(row["id"], reason, f"{where} of {len(text):,} characters: {reason}")
    captions = row.get("captions", [])
    faults = [fault_of(caption, settings.max_text) for caption in captions]
    if not any(faults):
        return outcome
    good = [caption for caption, fault in zip(captions, faults, strict=True) if fault is None]
    found = [fault for fault in faults if fault is not None]
    if not good and not row.get("conversations"):
        text = f"no caption can be kept, the first: {found[0]} ({len(captions[0]):,} characters)"
        return RefusedSample(row["id"], found[0], text)
    kept: Row = {**row, "captions": good}
    return Loaded(outcome.split, kept, (*outcome.counts, *(f"captions-left-out/{fault}" for fault in found)))


def _must_be_good(row: Row, longest: int) -> Iterator[tuple[str, str, int]]:
    yield "the id", row["id"], _LONGEST_ID
    for number, turn in enumerate(row.get("conversations") or []):
        yield f"turn {number}", turn["value"], longest
    for one in row.get("objects") or []:
        yield "a category", one["category"], longest
    for image in (row.get("image"), *(row.get("more_images") or [])):
        if image:
            yield "the image's name", image["path"], _LONGEST_ID
