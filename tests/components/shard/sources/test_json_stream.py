"""JSON files that are read element by element."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.contract.store import open_store
from components.shard import ShardSettings
from components.shard.sources import json_stream, record_index
from components.shard.sources.json_stream import JsonStream, parse
from llava.errors import RefusedInput
from tests.support.sources import (
    found,
)

# Files of any size


def test_a_json_file_is_read_element_by_element_whatever_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [{"id": n, "text": "é中" * (n % 9), "deep": [[n, {"a": None}]]} for n in range(60)] + [
        1,
        22,
        "x",
        3.5e2,
    ]
    for chunk in (1, 7, 64, 4096):
        monkeypatch.setattr(json_stream, "_CHUNK", chunk)
        for text in (
            json.dumps(values),
            json.dumps(values, ensure_ascii=False, indent=1),
            "\ufeff" + json.dumps({"info": {"a": [1]}, "rows": values, "none": [], "last": 3}),
        ):
            (tmp_path / "a.json").write_text(text)
            raw = (tmp_path / "a.json").read_bytes()
            stream = JsonStream(open_store(tmp_path), "a.json")
            elements = list(stream)
            assert [one.value for one in elements] == values
            assert [parse(raw[one.start : one.start + one.size]) for one in elements] == values
            assert stream.lists == ({"rows", "none"} if "rows" in text else {""})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[1",
        "[1,",
        "[1,]",
        '{"a":[1}',
        "[1] x",
        '{"a" 1}',
        '{"a":1,}',
        "{1:2}",
        "[1 2]",
        "no",
        "[" * 99_999,
    ],
)
def test_what_is_no_json_is_refused_with_the_place(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RefusedInput, match=r"a\.json is not valid JSON: .* near byte \d+"):
        list(JsonStream(open_store(tmp_path), "a.json"))


def test_a_file_of_one_endless_value_is_refused_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (json_stream, record_index):
        monkeypatch.setattr(module, "LONGEST", 10_000)
    monkeypatch.setattr(json_stream, "_CHUNK", 1000)
    (tmp_path / "mix.json").write_text('["' + "x" * 100_000)
    with pytest.raises(RefusedInput, match="a value of more than 10,000 bytes"):
        found(ShardSettings(source="llava", path=str(tmp_path)))
    (tmp_path / "mix.json").rename(tmp_path / "mix.jsonl")
    with pytest.raises(RefusedInput, match="line 1 has 100,002 bytes"):
        found(ShardSettings(source="llava", path=str(tmp_path)))
