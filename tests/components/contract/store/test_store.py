"""Both stores keep one contract: whole writes, one winner, compare and swap, listing, errors in one line."""

from __future__ import annotations

import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.contract import open_store
from components.contract.store import StoreError, s3, s3_client
from llava.errors import RefusedInput


def test_bytes_and_files_come_back(root: str, tmp_path: Path) -> None:
    store = open_store(root)
    store.write("a/b.bin", b"one")
    store.write("a/b.bin", b"other")
    assert store.read("a/b.bin") == b"other"
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 50)
    store.upload(source, "deep/er/file")
    store.download("deep/er/file", tmp_path / "x" / "back")
    assert (tmp_path / "x" / "back").read_bytes() == source.read_bytes()
    assert b"".join(store.chunks("deep/er/file", size=1000)) == source.read_bytes()
    stat = store.stat("deep/er/file")
    assert stat is not None and stat.size == 12_800


def test_a_copy_has_the_bytes_and_outlives_its_source(root: str) -> None:
    first, second = open_store(root).sub("first"), open_store(root).sub("second")
    first.write("a/old", b"bytes")
    second.copy(first, "a/old", "b/new")
    second.copy(first, "a/old", "b/new")  # over what stands there
    first.write("a/old", b"others")
    first.delete_all()
    assert second.read("b/new") == b"bytes"
    with pytest.raises(FileNotFoundError):
        second.copy(first, "a/old", "b/newer")
    assert [entry.key for entry in second.list()] == ["b/new"]


def test_missing_key_is_none_or_file_not_found(root: str, tmp_path: Path) -> None:
    store = open_store(root)
    assert store.stat("no") is None and store.fetch("no/where") is None
    store.delete("no")
    for read in (
        lambda: store.read("no"),
        lambda: list(store.chunks("no")),
        lambda: store.download("no", tmp_path / "x"),
    ):
        with pytest.raises(FileNotFoundError, match="no"):
            read()
    assert list(tmp_path.glob("**/.~*")) == []


def test_of_sixteen_racers_one_creates(root: str) -> None:
    store = open_store(root)
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda number: store.create("taken", b"racer %d" % number), range(16)))
    assert won.count(True) == 1
    assert store.read("taken") == b"racer %d" % won.index(True)


def test_of_racers_that_swap_one_version_one_wins(root: str) -> None:
    store = open_store(root)
    store.create("key", b"start")
    found = store.fetch("key")
    assert found is not None
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: store.swap("key", b"%d" % number, found[1]), range(8)))
    assert won.count(True) == 1
    assert store.read("key") == b"%d" % won.index(True)


def test_concurrent_increments_by_swap_lose_none(root: str) -> None:
    store = open_store(root)
    store.create("count", b"0")

    def increment(_: int) -> None:
        while True:
            found = store.fetch("count")
            assert found is not None
            if store.swap("count", b"%d" % (int(found[0]) + 1), found[1]):
                return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(increment, range(24)))
    assert store.read("count") == b"24"


def test_swap_of_a_missing_key_is_refused(root: str) -> None:
    store = open_store(root)
    assert store.swap("gone", b"x", "any-version") is False
    store.create("key", b"x")
    stat = store.stat("key")
    assert stat is not None
    store.delete("key")
    assert store.swap("key", b"y", stat.version) is False
    assert store.stat("key") is None


def test_list_is_sorted_by_prefix_and_relative(root: str) -> None:
    store = open_store(root)
    for key in ("b", "a/2", "a/1", "ab", "a.x"):
        store.write(key, key.encode())
    assert [entry.key for entry in store.list()] == ["a.x", "a/1", "a/2", "ab", "b"]
    assert [entry.key for entry in store.list("a/")] == ["a/1", "a/2"]
    assert [entry.key for entry in store.list("a")] == ["a.x", "a/1", "a/2", "ab"]
    inner = store.sub("a")
    assert [(entry.key, entry.size) for entry in inner.list()] == [("1", 3), ("2", 3)]
    stat = inner.stat("1")
    assert stat is not None and next(iter(inner.list())).version == stat.version


def test_delete_all_keeps_to_its_folder(root: str) -> None:
    store = open_store(root)
    for key in ("step-1/a", "step-1/b/c", "step-10/a"):
        store.write(key, b"")
    store.delete_all("step-1")
    assert [entry.key for entry in store.list()] == ["step-10/a"]
    store.sub("step-10").delete_all()
    assert list(store.list()) == []


def test_a_link_that_leads_to_itself_is_not_listed_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert [entry.key for entry in open_store(tmp_path).list()] == ["file"]


def test_listing_and_deleting_go_past_one_page_of_s3(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_AT_ONCE", 4)
    store = open_store(s3_root)
    for number in range(11):
        store.write(f"many/{number:04d}", b"")
    assert len(list(store.list("many/"))) == 11
    store.delete_all("many")
    assert list(store.list()) == []


def test_large_files_go_in_parts(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client, "_PART", 5 << 20)  # S3's smallest part
    source = tmp_path / "large"
    source.write_bytes(bytes(11 << 20))
    store = open_store(s3_root)
    store.upload(source, "large")
    stat = store.stat("large")
    assert stat is not None and stat.size == 11 << 20
    assert "-3" in stat.version, "three parts show in the ETag"
    store.download("large", tmp_path / "back")
    assert (tmp_path / "back").stat().st_size == 11 << 20


def test_pyarrow_writes_where_the_store_reads(root: str) -> None:
    store = open_store(root)
    filesystem, base = store.sub("data").arrow()
    filesystem.create_dir(f"{base}/train", recursive=True)
    pq.write_table(pa.table({"x": [1, 2]}), f"{base}/train/part.parquet", filesystem=filesystem)
    assert "data/train/part.parquet" in [entry.key for entry in store.list()]
    assert pq.read_table(f"{base}/train/part.parquet", filesystem=filesystem).to_pydict() == {"x": [1, 2]}
    store.delete_all("data")
    assert list(store.list()) == []
    if isinstance(store, s3.S3Store):
        assert list(store._objects("data/")) == [], "pyarrow's folder marks go too"


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/../../b", "a/", ".", "a\\b", ".~lock-x"])
def test_keys_never_leave_the_prefix(key: str, folder_root: str) -> None:
    for store in (open_store(folder_root), open_store("s3://bucket/prefix")):
        for use in (store.read, store.delete, store.stat):
            with pytest.raises(RefusedInput, match="relative path"):
                use(key)
    with pytest.raises(RefusedInput):
        list(open_store(folder_root).list("../"))


@pytest.mark.parametrize(
    "uri", ["gs://b/p", "file:///tmp/x", "http://host/x", "", "s3://", "s3://UPPER/x", "s3://b/../c"]
)
def test_other_roots_are_refused(uri: str) -> None:
    with pytest.raises(RefusedInput):
        open_store(uri)


def test_credentials_in_the_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(RefusedInput) as refusal:
        open_store("s3://key:hunter2@bucket/prefix")
    assert "hunter2" not in str(refusal.value)


def test_stores_travel_to_other_processes(root: str) -> None:
    store = open_store(root)
    store.write("a", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store and copy.read("a") == b"1"


def test_probe_leaves_nothing(root: str) -> None:
    store = open_store(root)
    store.probe()
    assert list(store.list()) == []


def test_probe_names_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RefusedInput, match=str(tmp_path / "file")):
        open_store(tmp_path / "file" / "root").probe()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "AWS_ENDPOINT_URL=http://127.0.0.1:9"),
        ({"AWS_ENDPOINT_URL": "silent"}, "AWS_ENDPOINT_URL=http://127.0.0.1"),
        ({"AWS_ENDPOINT_URL": "not a url"}, "AWS_ENDPOINT_URL"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "set AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "refuses these credentials"),
    ],
)
def test_probe_fails_in_seconds_and_says_what_to_set(
    change: dict[str, str | None],
    says: str,
    s3_root: str,
    silent_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in change.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, silent_server if value == "silent" else value)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    started = time.monotonic()
    with pytest.raises(RefusedInput) as refusal:
        open_store(s3_root).probe()
    assert time.monotonic() - started < 10
    message = str(refusal.value)
    assert says in message and s3_root in message and "\n" not in message


def test_missing_bucket_is_named(s3_root: str) -> None:
    store = open_store("s3://no-such-bucket/x")
    with pytest.raises(RefusedInput, match="bucket no-such-bucket does not exist"):
        store.probe()
    with pytest.raises(StoreError, match="no-such-bucket"):
        store.read("x")
