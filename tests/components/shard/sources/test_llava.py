"""Conversations in LLaVA's JSON: long lists, bad lines, hostile ids."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from components.shard import ShardSettings
from components.shard.sources.base import RefusedSample
from tests.support.repository import REPOSITORY
from tests.support.sources import (
    found,
    llava,
)

MEMORY = """
    import sys
    from pathlib import Path
    from components.shard import ShardSettings
    from components.shard.sources import SOURCES

    def status(name):
        return int(next(line for line in Path("/proc/self/status").open() if line.startswith(name)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    listing = SOURCES["llava"].listing(ShardSettings(source="llava", path=sys.argv[1]))
    number, data = listing.items[len(listing.items) - 1]
    print(len(listing.items), number, (status("VmHWM") - before) // 1024)
"""


def test_a_large_list_of_conversations_is_listed_in_little_memory(tmp_path: Path) -> None:
    record = {
        "id": "x",
        "conversations": [{"from": "human", "value": "?" * 300}, {"from": "gpt", "value": "!" * 1700}],
    }
    text = json.dumps(record)
    with (tmp_path / "mix.json").open("w") as file:
        file.write("[" + (text + ",\n") * 39_999 + text + "]")
    size = (tmp_path / "mix.json").stat().st_size
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    records, last, mebibytes = map(int, done.stdout.split())
    print(f"{size / 1e6:.0f} MB listed with {mebibytes} MiB more memory")
    assert (records, last) == (40_000, 39_999)
    assert size > 80e6
    assert mebibytes < 60


def test_one_bad_line_of_a_jsonl_file_is_one_refused_sample(tmp_path: Path) -> None:
    settings = llava(tmp_path, [None, None], "mix.jsonl")
    good = (tmp_path / "mix.jsonl").read_bytes().splitlines(keepends=True)
    deep = b'{"a":' * 50_000 + b"\n"
    (tmp_path / "mix.jsonl").write_bytes(
        b"\r\n".join([good[0], b"{oops", b"", b'{"id": "\xff\xfe"}', deep, b"7", good[1]])
    )
    reasons = [getattr(one, "reason", "") for one in found(settings)]
    assert reasons == ["", "no-json", "no-turns", "no-json", "no-record", ""]


@pytest.mark.parametrize("name", ["x" * 5000, "half \ud800", "nul\0", {"a": 1}, ["\ud800"]])
def test_a_hostile_id_is_refused_under_a_name_that_can_be_written(tmp_path: Path, name: Any) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]
    (tmp_path / "mix.json").write_text(json.dumps([{"id": name, "conversations": turns}]))
    (outcome,) = found(ShardSettings(source="llava", path=str(tmp_path), heldout=0))
    if isinstance(outcome, RefusedSample):
        assert outcome.name.encode() and len(outcome.name) <= 201 and outcome.name.isprintable()
    else:
        assert outcome.row["id"] == str(name)
