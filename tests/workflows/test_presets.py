"""docs/presets.md: what it says of our side is what the presets say, and no line of a recipe is missing there."""

import re
from functools import cache
from typing import Any, NamedTuple

import pytest
import yaml

from components.contract.component import Settings, recipe
from tests.support.repository import REPOSITORY
from workflows import config as configs

PAGE = REPOSITORY / "docs/presets.md"
PAPERS = [name for name in configs.preset_names() if name.startswith("llava-")]
LEFT_OUT = ("evaluate", "register", "instruct", "estimate", "name")
"""Sections of a preset that no script of the authors has a word about."""
SCRIPT = re.compile(r"^`--\S+ (\S+)`$")
GPUS = 8


class Line(NamedTuple):
    """One row of a table, for every preset that the table is about."""

    presets: tuple[str, ...]
    authors: str
    key: str
    here: str
    verdict: str


@cache
def lines() -> tuple[Line, ...]:
    """Every row that has a key."""
    found, presets = [], ()
    for paragraph in PAGE.read_text().split("\n\n"):
        if named := re.search(r"Presets: (.+)\.$", paragraph):
            presets = tuple(re.findall(r"`([\w.-]+)`", named[1]))
        for row in paragraph.splitlines():
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            if row.startswith("| ") and len(cells) == 4 and cells[1].startswith("`"):
                found.append(Line(presets, cells[0], cells[1].strip("`"), cells[2].strip("`"), cells[3]))
    return tuple(found)


@cache
def loaded(preset: str) -> Any:
    return configs.load(preset, ["shard.path=/data", "shard_captions.path=/data"])


def value_of(preset: str, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(loaded(preset), section), name)


@pytest.mark.parametrize("line", lines(), ids=lambda line: f"{line.key} of {line.presets[0]}")
def test_our_side_of_a_row_is_what_its_presets_say(line: Line) -> None:
    assert set(line.presets) <= set(PAPERS)
    for preset in line.presets:
        assert value_of(preset, line.key) == yaml.safe_load(line.here), preset


@pytest.mark.parametrize("preset", PAPERS)
def test_every_line_of_a_preset_has_its_row(preset: str) -> None:
    written = yaml.safe_load((configs.PRESETS / f"{preset}.yaml").read_text())
    shown = [line.key for line in lines() if preset in line.presets]
    assert len(shown) == len(set(shown)), "a key stands twice for one preset"
    for section in set(written) - set(LEFT_OUT):
        settings: Settings = getattr(loaded(preset), section)
        keys = {f"{section}.{name}" for name in set(written[section]) & set(recipe(settings))}
        assert keys - {f"{section}.kind"} <= set(shown), preset


def test_a_row_is_equal_or_says_why_not() -> None:
    for line in lines():
        reason = re.fullmatch(r"(equal|different)\b(.*)", line.verdict)
        assert reason is not None, line
        assert reason[1] == "equal" or len(reason[2]) > 20, line


def test_what_a_script_says_in_a_number_or_a_name_is_ours_where_the_row_says_equal() -> None:
    compared = 0
    for line in lines():
        script = SCRIPT.match(line.authors)
        if script is None or not line.verdict.startswith("equal") or "/" in script[1].removeprefix("openai/"):
            continue
        theirs, ours = yaml.safe_load(script[1]), yaml.safe_load(line.here)
        if "batch_size" in line.authors:
            theirs *= GPUS
        if line.key.endswith("precision"):
            theirs = "bf16" if theirs else "fp32"
        compared += 1
        assert (float(theirs) == float(ours)) if _is_number(theirs) else theirs == ours, line
    assert compared > 30


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)
