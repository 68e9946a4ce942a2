"""Pipes, devices, sockets, links and odd names where data is expected: nothing hangs, nothing outside is read."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from components.contract import (
    MANIFEST,
    Artifact,
    DataFolder,
    FileEntry,
    Links,
    Manifest,
    RefusedFile,
    Store,
    fingerprint,
    open_artifact,
    open_data_store,
    open_store,
    verify,
)
from components.scoring.base import texts_in
from components.scoring.benchmarks.reading import copy
from components.shard import Shard, ShardSettings
from components.shard.sources import SOURCES, webdataset
from components.shard.sources.photos import refused_files
from llava.errors import RefusedInput
from tests.components.conftest import lines, run_at, run_in
from tests.support.sources import (
    coco,
    found,
    in_folder,
    in_tar,
    jpeg,
    llava,
    told,
)
from tests.support.time_limit import within
from workflows.retraining import retrain as retraining
from workflows.retraining.drops import READY, Drop, look, open_drop

__all__ = ["lines", "run_at", "run_in"]
SECRET = b"not for you"


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    with within(20):
        yield


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A folder beside the data, which no data may reach."""
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg())
    (folder / "secret.txt").write_bytes(SECRET)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "real.txt").write_bytes(b"fine")
    return folder


def bind(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


NO_FILES: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "socket": bind,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


def keys(store: Store) -> list[str]:
    return [entry.key for entry in store.list()]


def reasons(store: Store) -> dict[str, str]:
    return {one.key: one.reason for one in store.refused()}


# The listing


@pytest.mark.parametrize("links", Links)
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_neither_listed_nor_read(data: Path, kind: str, links: Links) -> None:
    NO_FILES[kind](data / "odd.txt")
    store = DataFolder(data, links)
    assert keys(store) == ["real.txt"]
    wanted = {Links.NONE: "link", Links.INSIDE: "link-outside", Links.ALL: "not-a-file"}
    assert reasons(store) == {"odd.txt": wanted[links] if kind == "device" else "not-a-file"}
    for read in (store.read, store.sha256, store.open, store.stat):
        with pytest.raises(RefusedFile):
            read("odd.txt")


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_root_does_not_wait_for_what_is_no_file(data: Path, kind: str) -> None:
    NO_FILES[kind](data / "odd.txt")
    store = open_store(data)
    assert keys(store) == ["real.txt"]
    assert store.stat("odd.txt") is None
    for read in (store.read, store.sha256, store.open):
        with pytest.raises(RefusedFile):
            read("odd.txt")
    with pytest.raises(FileNotFoundError):
        store.sub("to").copy(store, "odd.txt", "odd.txt")


def test_links_are_followed_inside_the_folder_or_where_that_is_asked_for(data: Path, private: Path) -> None:
    (data / "sub").mkdir()
    (data / "sub" / "b.txt").write_bytes(b"b")
    (data / "inside").symlink_to("sub")
    (data / "outside").symlink_to(private)
    (data / "out.txt").symlink_to(private / "secret.txt")
    (data / "in.txt").symlink_to(data / "real.txt")
    real, inside = {"real.txt", "sub/b.txt"}, {"in.txt", "inside/b.txt"}
    outside = {"out.txt", "outside/a.jpg", "outside/secret.txt"}
    assert set(keys(DataFolder(data, Links.NONE))) == real
    assert set(keys(DataFolder(data, Links.INSIDE))) == real | inside
    assert set(keys(DataFolder(data, Links.ALL))) == real | inside | outside
    assert reasons(DataFolder(data, Links.INSIDE)) == {"out.txt": "link-outside", "outside": "link-outside"}
    for key in outside:
        with pytest.raises(RefusedFile, match="follow_links=true follows it"):
            DataFolder(data).read(key)
        assert DataFolder(data, Links.ALL).read(key) == open_store(data).read(key)
    for key in inside:
        assert DataFolder(data).read(key)
        with pytest.raises(RefusedFile):
            DataFolder(data, Links.NONE).read(key)


def test_the_folder_that_is_named_may_be_a_link_unless_none_is_followed(data: Path, tmp_path: Path) -> None:
    (tmp_path / "named").symlink_to(data)
    assert keys(open_data_store(tmp_path / "named")) == ["real.txt"]
    assert open_data_store(tmp_path / "named").read("real.txt") == b"fine"
    none = open_data_store(tmp_path / "named", follow_links=False)
    assert (keys(none), reasons(none)) == ([], {".": "link"})
    with pytest.raises(RefusedFile):
        none.read("real.txt")


def test_loops_and_twins_of_links_end(data: Path) -> None:
    (data / "loop").symlink_to("loop")
    (data / "gone").symlink_to("nowhere")
    (data / "a").mkdir()
    (data / "a" / "up").symlink_to(data)
    (data / "a" / "across").symlink_to(data / "b")
    (data / "b").mkdir()
    (data / "b" / "back").symlink_to(data / "a")
    for level in range(40):  # each with two links to the next: a million millions of names
        (data / f"{level}").mkdir()
        for side in "lr":
            (data / f"{level}" / side).symlink_to(data / f"{level + 1}")
    store = DataFolder(data)
    assert "real.txt" in keys(store)
    assert len(keys(store)) < 5000
    found = reasons(store)
    assert found["loop"] == "unreadable"
    assert found["gone"] == "link-to-nothing"
    assert found["a/up"] == "link-loop"
    assert set(found.values()) == {"unreadable", "link-to-nothing", "link-loop", "link-again"}


def test_a_name_that_is_no_utf_8_is_refused_and_told_with_escapes(data: Path) -> None:
    Path(os.fsdecode(bytes(data) + b"/caf\xe9.jpg")).write_bytes(jpeg())
    (data / "back\\slash.jpg").write_bytes(jpeg())
    Path(os.fsdecode(bytes(data) + b"/folder\xff")).mkdir()
    store = DataFolder(data)
    assert keys(store) == ["real.txt"]
    assert "real.txt" in keys(open_store(data))
    assert reasons(store) == {"back\\slash.jpg": "name", "caf\\xe9.jpg": "name", "folder\\xff": "name"}
    assert len(fingerprint(data)) == 64


def test_what_comes_to_stand_for_something_else_after_it_was_looked_at_is_not_read(
    data: Path, private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is swapped at every call that looks at it: what is opened is what was judged."""
    store, opened = DataFolder(data), os.open
    target = private / "secret.txt"

    def swapping(path: Any, *more: Any, **options: Any) -> int:
        descriptor = opened(path, *more, **options)
        if str(path).endswith("real.txt"):
            (data / "real.txt").unlink()
            (data / "real.txt").symlink_to(target)
        return descriptor

    monkeypatch.setattr(os, "open", swapping)
    with suppress(FileNotFoundError, RefusedFile):  # it was deleted while it was looked at
        assert store.read("real.txt") == b"fine"
    with pytest.raises(RefusedFile):
        store.read("real.txt")


def test_a_name_that_is_swapped_all_the_time_never_gives_what_lies_outside(data: Path, private: Path) -> None:
    name, other = data / "real.txt", data / ".~other"
    child = os.fork()
    if child == 0:
        while True:
            other.symlink_to(private / "secret.txt")
            other.replace(name)
            other.write_bytes(b"fine")
            other.replace(name)
    try:
        seen: Counter[str] = Counter()
        ends = time.monotonic() + 2
        while time.monotonic() < ends:
            try:
                seen[DataFolder(data).read("real.txt").decode()] += 1
            except (RefusedFile, FileNotFoundError) as error:
                seen[type(error).__name__] += 1
        assert seen["fine"]
        assert seen["RefusedFile"]
        assert SECRET.decode() not in seen
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.parametrize("kind", NO_FILES)
def test_an_artifact_whose_manifest_is_no_file_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    artifact = tmp_path / "root" / "shard" / "0123456789abcdef"
    artifact.mkdir(parents=True)
    NO_FILES[kind](artifact / MANIFEST)
    with pytest.raises(RefusedInput, match=r"manifest\.json"):
        open_artifact(str(artifact))


@pytest.mark.parametrize("kind", NO_FILES)
def test_an_artifact_with_a_file_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    folder = open_store(tmp_path / "root" / "shard" / "0123456789abcdef")
    Path(folder.uri).mkdir(parents=True)
    NO_FILES[kind](Path(folder.uri) / "train.parquet")
    file = FileEntry(path="train.parquet", size=0, sha256=hashlib.sha256(b"").hexdigest())
    manifest = Manifest.model_construct(files=(file,))
    with pytest.raises(RefusedInput, match=r"train\.parquet is missing"):
        verify(Artifact(folder, manifest))


# Fingerprints


def test_a_fingerprint_follows_the_links_that_are_read(data: Path, private: Path) -> None:
    (data / "outside").symlink_to(private)
    (data / "inside").mkdir()
    (data / "in.txt").symlink_to("inside")
    before = {links: fingerprint(data, links) for links in Links}
    assert len(set(before.values())) == 3
    (private / "a.jpg").write_bytes(b"another photo")
    after = {links: fingerprint(data, links) for links in Links}
    assert {links for links in Links if before[links] != after[links]} == {Links.ALL}
    NO_FILES["pipe"](data / "pipe")
    assert fingerprint(data, Links.INSIDE) != after[Links.INSIDE]


def test_a_linked_folder_of_photos_that_changed_is_another_dataset(tmp_path: Path) -> None:
    in_folder(tmp_path, "mnt", {"a.jpg": jpeg()})
    settings = llava(tmp_path / "data", ["a.jpg"], follow_links=True)
    (tmp_path / "data" / "images").symlink_to(tmp_path / "mnt")
    before = SOURCES["llava"].external(settings)
    assert told(settings) == {"r0": ""}
    in_folder(tmp_path, "mnt", {"a.jpg": jpeg(60)})
    assert SOURCES["llava"].external(settings) != before


# Sources


def test_linked_photos_are_read_where_they_stay_inside_or_where_the_setting_says_so(
    data: Path, private: Path
) -> None:
    in_folder(data, "all", {"b.jpg": jpeg()})
    settings = llava(data, ["a.jpg", "photo.jpg", "b.jpg", "pipe.jpg", "zero.jpg"])
    (data / "images").mkdir()
    (data / "images" / "a.jpg").symlink_to(private / "a.jpg")
    (data / "images" / "photo.jpg").symlink_to(private / "secret.txt")
    (data / "images" / "b.jpg").symlink_to("../all/b.jpg")
    NO_FILES["pipe"](data / "images" / "pipe.jpg")
    NO_FILES["device"](data / "images" / "zero.jpg")
    wanted = {"r0": "link-outside", "r1": "link-outside", "r2": "", "r3": "not-a-file", "r4": "link-outside"}
    assert told(settings) == wanted
    versions = list(SOURCES["llava"].made_of(settings, *_listed(settings)))
    assert "link-outside" in str(versions)
    follow = settings.model_copy(update={"follow_links": True})
    assert told(follow) == {
        "r0": "",
        "r1": "unknown-format",
        "r2": "",
        "r3": "not-a-file",
        "r4": "not-a-file",
    }


def _listed(settings: ShardSettings) -> tuple[Any, Any]:
    listing = SOURCES[settings.source].listing(settings)
    return listing.shared, listing.items


@pytest.mark.parametrize("place", ["images", "train2017"])
def test_a_linked_folder_of_photos_is_refused_by_photo_and_read_on_demand(tmp_path: Path, place: str) -> None:
    in_folder(tmp_path, "mnt", {"a.jpg": jpeg(), "b.jpg": jpeg()})
    settings = coco(tmp_path / "data", ["a.jpg", "b.jpg"], "_train2017")
    (tmp_path / "data" / place).symlink_to(tmp_path / "mnt")
    assert told(settings) == {"a": "link-outside", "b": "link-outside"}
    assert "follow_links=true" in str(found(settings)[0])
    assert told(settings.model_copy(update={"follow_links": True})) == {"a": "", "b": ""}
    assert [one.reason for one in refused_files(settings)] == ["link-outside"]


def test_a_data_folder_that_is_a_link_itself_is_read(tmp_path: Path) -> None:
    settings = coco(tmp_path / "mnt", ["a.jpg"])
    in_folder(tmp_path / "mnt", "images", {"a.jpg": jpeg()})
    (tmp_path / "coco").symlink_to(tmp_path / "mnt")
    assert told(settings.model_copy(update={"path": str(tmp_path / "coco")})) == {"a": ""}


@pytest.mark.parametrize("source", ["llava", "cc3m", "coco"])
@pytest.mark.parametrize("kind", [*NO_FILES, "link"])
def test_a_list_of_samples_that_is_no_file_of_the_folder_is_refused_in_one_line(
    data: Path, private: Path, source: str, kind: str
) -> None:
    name = {"llava": "data.json", "cc3m": "links.tsv", "coco": "annotations/captions.json"}[source]
    setting = {"llava": "conversations", "cc3m": "captions", "coco": "captions"}[source]
    (data / "annotations").mkdir()
    make = NO_FILES.get(kind, lambda path: path.symlink_to(private / "secret.txt"))
    make(data / name)
    for named in ({}, {setting: name}):
        settings = ShardSettings(source=source, path=str(data), **named)
        assert len(SOURCES[source].external(settings)) == 1
        with pytest.raises(RefusedInput, match=name.rpartition("/")[2]) as error:
            SOURCES[source].check(settings)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [*NO_FILES, "folder"])
def test_linked_tars_are_seen_and_what_is_none_is_counted(tmp_path: Path, kind: str) -> None:
    files = {"s.jpg": jpeg(), "s.txt": b"a caption"}
    for folder in ("data", "mnt"):
        (tmp_path / folder).mkdir()
        in_tar(tmp_path / folder, "a" if folder == "data" else "b", files)
    settings = ShardSettings(source="webdataset", path=str(tmp_path / "data"), heldout=0)
    if kind == "folder":
        (tmp_path / "data" / "more").symlink_to(tmp_path / "mnt")
        follow = settings.model_copy(update={"follow_links": True})
        assert [file.key for file in webdataset.listing(follow).items] == ["a.tar", "more/b.tar"]
        assert len(found(follow)) == 2
        assert [one.reason for one in refused_files(settings)] == ["link-outside"]
        return
    NO_FILES[kind](tmp_path / "data" / "odd.tar")
    listing = webdataset.listing(settings)
    assert [file.key for file in listing.items] == ["a.tar"]
    assert [one.key for one in listing.refused] == ["odd.tar"]


def test_parquet_files_that_are_none_are_counted(data: Path) -> None:
    NO_FILES["pipe"](data / "x.parquet")
    settings = ShardSettings(source="parquet", path=str(data), texts=("caption",))
    with pytest.raises(
        RefusedInput, match=r"no file is named like .*left out: 1 x not-a-file, such as x\.parquet"
    ):
        SOURCES["parquet"].check(settings)


@pytest.mark.services
def test_the_report_counts_what_is_no_file(tmp_path: Path, run_in: Any) -> None:
    in_folder(tmp_path / "data", "images", {"a.jpg": jpeg(), "c.jpg": jpeg()})
    settings = llava(tmp_path / "data", ["a.jpg", "b.jpg", "c.jpg"], max_bad=1)
    NO_FILES["pipe"](tmp_path / "data" / "images" / "b.jpg")
    NO_FILES["device"](tmp_path / "data" / "zero")
    Path(os.fsdecode(bytes(tmp_path / "data") + b"/caf\xe9.jpg")).write_bytes(jpeg())
    with within(200):
        notes = run_in(Shard(), settings).artifact.manifest.notes
    assert notes["refused"]["not-a-file"] == {"count": 1, "ids": ["r1"]}
    assert notes["left_out"] == {"files: link-outside": 1, "files: name": 1, "files: not-a-file": 1}
    assert len(notes["files_left_out"]) == 3


@pytest.mark.services
def test_a_tar_that_is_a_pipe_is_a_refused_sample(tmp_path: Path, run_in: Any) -> None:
    (tmp_path / "data").mkdir()
    in_tar(tmp_path / "data", "a", {"s.jpg": jpeg(), "s.txt": b"a caption"})
    NO_FILES["pipe"](tmp_path / "data" / "b.tar")
    settings = ShardSettings(source="webdataset", path=str(tmp_path / "data"), heldout=0, max_bad=0.6)
    with within(200):
        notes = run_in(Shard(), settings).artifact.manifest.notes
    assert notes["refused"] == {"not-a-file": {"count": 1, "ids": ["b.tar"]}}


# Benchmarks


@pytest.mark.parametrize("kind", [*NO_FILES, "link"])
def test_labels_that_are_no_files_of_their_folder_are_refused(
    data: Path, private: Path, tmp_path: Path, kind: str
) -> None:
    make = NO_FILES.get(kind, lambda path: path.symlink_to(private / "secret.txt"))
    make(data / "labels.json")
    with pytest.raises(RefusedInput, match=r"labels\.json"):
        copy(str(data), "labels", tmp_path / "copies")
    if kind == "link":
        copied = copy(str(data), "labels", tmp_path / "followed", follow_links=True)
        assert (copied / "labels.json").read_bytes() == SECRET
        return
    with pytest.raises(RefusedInput, match=r"labels\.json"):
        copy(str(data / "labels.json"), "labels", tmp_path / "copies")
    with pytest.raises(RefusedInput, match=r"labels\.json: no regular file"):
        texts_in(data, "*.json")


# Drops


def arrive(incoming: Path, name: str = "monday") -> Path:
    drop = incoming / name
    in_folder(drop, "images", {"a.jpg": jpeg()})
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    (drop / "data.json").write_text(json.dumps([{"id": "r", "image": "a.jpg", "conversations": turns}]))
    (drop / READY).touch()
    return drop


def new(tmp_path: Path) -> list[Drop]:
    return look(str(tmp_path / "root"), [str(tmp_path / "in")], settle=0).new


@pytest.mark.parametrize("kind", [*NO_FILES, "link-inside", "link-outside"])
@pytest.mark.parametrize("name", ["odd.json", "images/odd.jpg", "more"])
def test_a_drop_with_what_is_no_file_is_taken_without_it(
    tmp_path: Path, private: Path, kind: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    drop = arrive(tmp_path / "in")
    (before,) = new(tmp_path)
    targets = {"link-inside": drop / "data.json", "link-outside": private}
    make = NO_FILES.get(kind, lambda path: path.symlink_to(targets[kind]))
    make(drop / name)
    (found,) = new(tmp_path)
    assert (found.digest, found.files) == (before.digest, 3)
    assert retraining._contents(found) == retraining._contents(before)
    refused = retraining._Retraining.refused(None, found, open_drop(found.uri))  # type: ignore[arg-type]
    assert [one.key for one in refused] == (["odd.json"] if name == "odd.json" else [])
    assert f"not read: {name}" in capsys.readouterr().err


def test_links_in_a_drop_are_never_followed(tmp_path: Path, private: Path) -> None:
    drop = arrive(tmp_path / "in")
    (drop / "images" / "a.jpg").unlink()
    (drop / "images" / "a.jpg").symlink_to(private / "a.jpg")
    settings = ShardSettings(
        source="llava", path=str(drop), conversations="data.json", follow_links=False, heldout=0
    )
    assert told(settings) == {"r": "link"}
    (drop / "images" / "a.jpg").unlink()
    (drop / "images").rmdir()
    (drop / "images").symlink_to(private)
    assert told(settings) == {"r": "link"}


@pytest.mark.parametrize("when", ["before it is looked at", "after it was looked at"])
def test_a_drop_that_is_a_link_is_no_drop(tmp_path: Path, private: Path, when: str) -> None:
    real = arrive(tmp_path / "elsewhere")
    if when.startswith("before"):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "monday").symlink_to(real)
        looked = look(str(tmp_path / "root"), [str(tmp_path / "in")], settle=0)
        assert (looked.new, looked.empty) == ([], [])
        assert [(one.key, one.reason) for one in looked.refused] == [(f"{tmp_path}/in/monday", "link")]
        return
    arrive(tmp_path / "in")
    (drop,) = new(tmp_path)
    (tmp_path / "in" / "monday").rename(tmp_path / "in" / "moved")
    (tmp_path / "in" / "monday").symlink_to(real)
    assert keys(open_drop(drop.uri)) == []
    settings = ShardSettings(source="llava", path=drop.uri, conversations="data.json", follow_links=False)
    with pytest.raises(RefusedInput, match="itself is a link"):
        SOURCES["llava"].check(settings)


def test_the_place_of_drops_may_be_a_link(tmp_path: Path) -> None:
    arrive(tmp_path / "mnt")
    (tmp_path / "in").symlink_to(tmp_path / "mnt")
    (drop,) = new(tmp_path)
    assert len(keys(open_drop(drop.uri))) == 3
