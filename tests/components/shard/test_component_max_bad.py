"""The share of bad samples is a matter of the run: another one costs no finished work and lets nothing through."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.shard import Shard, ShardSettings
from components.shard.source_settings import DownloadSettings
from llava.errors import LlavaError, RefusedInput
from tests.support.strange_server import StrangeServer


def jpeg() -> bytes:
    Image.new("RGB", (40, 40), (10, 120, 200)).save(buffer := io.BytesIO(), format="JPEG")
    return buffer.getvalue()


def links(folder: Path, server: StrangeServer, max_bad: float) -> ShardSettings:
    """Twelve links, every fourth of them dead, in six shards; a list that stands there is left as it is."""
    if not folder.exists():
        folder.mkdir()
        urls = [f"{server.url}/{'404' if number % 4 == 0 else 'ok'}-{number}" for number in range(12)]
        (folder / "list.tsv").write_text("".join(f"a photo\t{url}\n" for url in urls))
    return ShardSettings(
        source="cc3m",
        path=str(folder),
        heldout=0,
        allow_private=True,
        rows_per_shard=2,
        workers=1,
        quality=False,
        download=DownloadSettings(timeout=5.0),
        max_bad=max_bad,
    )


def test_a_run_that_stopped_on_too_many_dead_links_goes_on_under_a_higher_limit_and_asks_for_none_twice(
    run_in: Any, tmp_path: Path, lines: Any
) -> None:
    with StrangeServer(jpeg()).running() as server:
        with pytest.raises(LlavaError, match=r"2 of 12 samples refused, limit shard\.max_bad=0\.1:"):
            run_in(Shard(), links(tmp_path / "data", server, 0.1))
        assert 0 < len(server.hits) < 12
        artifact = run_in(Shard(), links(tmp_path / "data", server, 0.5)).artifact
    assert artifact.manifest.notes["rows"] == {"train": 9, "heldout": 0}
    assert len(server.hits) == 12 and set(server.hits.values()) == {1}
    assert any("found finished" in line for line in lines.said)


def test_a_finished_dataset_is_not_taken_under_a_limit_that_it_breaks(run_in: Any, tmp_path: Path) -> None:
    with StrangeServer(jpeg()).running() as server:
        made = run_in(Shard(), links(tmp_path / "data", server, 0.5)).artifact
        told = r"3 of 12 samples refused, limit shard\.max_bad=0\.2: 3 x http-404\. Mend the source, or raise"
        with pytest.raises(RefusedInput, match=told) as refusal:
            run_in(Shard(), links(tmp_path / "data", server, 0.2))
        assert str(refusal.value).startswith(made.uri) and "\n" not in str(refusal.value)
        again = run_in(Shard(), links(tmp_path / "data", server, 0.25))
    assert again.reused and again.artifact.digest == made.digest
