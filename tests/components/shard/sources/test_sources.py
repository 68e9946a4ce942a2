"""Sources and the places of their photos: what is read, from where, and what is refused under which name."""

from __future__ import annotations

import errno
import io
import json
import random
import stat
import struct
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from components.contract.store import FolderStore, open_store
from components.shard import Shard, ShardSettings
from components.shard.sources import SOURCES, base, json_stream, outcomes, record_index
from components.shard.sources.base import RefusedSample
from components.shard.sources.json_stream import JsonStream, parse
from llava.data.images import decode
from llava.errors import LlavaError, RefusedInput
from tests.support.repository import REPOSITORY

Files = dict[str, bytes]


def jpeg(side: int = 40, colour: int = 120, wide: int | None = None) -> bytes:
    Image.new("RGB", (wide or side, side), (10, colour, 200)).save(buffer := io.BytesIO(), format="JPEG")
    return buffer.getvalue()


def photos(count: int) -> Files:
    return {f"{number:03d}.jpg": jpeg(colour=number) for number in range(count)}


def found(settings: ShardSettings) -> list[Any]:
    """What the source gives, without Ray."""
    SOURCES[settings.source].check(settings)
    listing = SOURCES[settings.source].listing(settings)
    return list(outcomes(settings, listing.shared, listing.items, open_store("/nowhere")))


def told(settings: ShardSettings) -> dict[str, str]:
    """Reason by name, "" for a row."""
    return {
        one.name if isinstance(one, RefusedSample) else one.row["id"]: getattr(one, "reason", "")
        for one in found(settings)
    }


def bytes_of(settings: ShardSettings) -> list[bytes]:
    return [one.row["image"]["bytes"] for one in found(settings)]


def in_folder(folder: Path, name: str, files: Files) -> None:
    for path, data in files.items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_bytes(data)


def in_zip(folder: Path, name: str, files: Files, method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(folder / f"{name}.zip", "w", method) as archive:
        for path, data in files.items():
            archive.writestr(path, data)


def in_tar(folder: Path, name: str, files: Files, mode: str = "w:") -> None:
    suffix = {"w:": ".tar", "w:gz": ".tar.gz"}[mode]
    with tarfile.open(folder / f"{name}{suffix}", mode) as archive:  # type: ignore[call-overload]
        for path, data in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def coco(folder: Path, files: Iterable[str], year: str = "") -> ShardSettings:
    (folder / "annotations").mkdir(parents=True)
    names = sorted(files)
    table = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [
            {"image_id": number, "caption": f"photo {name}"} for number, name in enumerate(names)
        ],
    }
    (folder / "annotations" / f"captions{year}.json").write_text(json.dumps(table))
    return ShardSettings(source="coco", path=str(folder), heldout=0)


def llava(folder: Path, images: Iterable[Any], name: str = "mix.json", **options: Any) -> ShardSettings:
    folder.mkdir(exist_ok=True)
    records = []
    for number, image in enumerate(images):
        slots = "<image>\n" * (len(image) if isinstance(image, list) else image is not None)
        turns = [{"from": "human", "value": f"{slots}What?"}, {"from": "gpt", "value": "It."}]
        records.append(
            {"id": f"r{number}", "conversations": turns} | ({} if image is None else {"image": image})
        )
    text = (
        json.dumps(records) if name.endswith(".json") else "".join(json.dumps(one) + "\n" for one in records)
    )
    (folder / name).write_text(text)
    return ShardSettings(source="llava", path=str(folder), **{"heldout": 0, **options})


# Where photos lie


@pytest.mark.parametrize("put", [in_folder, in_zip, in_tar])
@pytest.mark.parametrize("name", ["images", "train2014"])
def test_cocos_photos_are_read_from_a_folder_a_zip_or_a_tar_of_its_own_names(
    tmp_path: Path, put: Callable[..., None], name: str
) -> None:
    files = {f"COCO_train2014_{number}": data for number, data in photos(5).items()}
    settings = coco(tmp_path / "data", files, "_train2014")
    # COCO's own zips hold a folder of their own name.
    inside = {f"{name}/{path}": data for path, data in files.items()} if put is in_zip else files
    put(tmp_path / "data", name, inside)
    assert bytes_of(settings) == list(files.values())


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_of_a_zip_are_read_in_place(tmp_path: Path, method: int) -> None:
    files = photos(40)
    settings = coco(tmp_path / "data", files)
    in_zip(tmp_path / "data", "images", files, method)
    assert bytes_of(settings) == list(files.values())


def test_photos_lie_in_several_roots_each_for_the_paths_that_begin_with_its_prefix(tmp_path: Path) -> None:
    files = photos(4)
    first, second, third, fourth = files.values()
    in_folder(tmp_path, "data/images", {"here.jpg": first})
    in_folder(tmp_path, "gqa", {"a.jpg": second, "here.jpg": b"never reached"})
    in_zip(tmp_path, "ocr", {"b.jpg": third})
    in_tar(tmp_path, "vg", {"./vg/c.jpg": fourth})
    settings = llava(
        tmp_path / "data",
        ["here.jpg", "gqa/images/a.jpg", "ocr/b.jpg", "c.jpg", "ocr/c.png", ["here.jpg", "c.jpg"], None],
        roots=(f"gqa/images/={tmp_path}/gqa", f"ocr/={tmp_path}/ocr.zip", f"{tmp_path}/vg.tar"),
    )
    rows = {one.row["id"]: one.row for one in found(settings) if not isinstance(one, RefusedSample)}
    assert [rows[f"r{n}"]["image"]["bytes"] for n in (0, 1, 2, 3, 5)] == [*files.values(), first]
    assert rows["r5"]["more_images"] == [{"bytes": fourth, "path": "c.jpg"}]
    assert "image" not in rows["r6"]
    assert told(settings)["r4"] == "image-missing"


def test_a_photo_added_to_any_root_changes_the_fingerprint(tmp_path: Path) -> None:
    in_folder(tmp_path, "more", photos(1))
    settings = llava(tmp_path / "data", ["000.jpg"], roots=(f"{tmp_path}/more",))
    before = Shard().external(settings)
    in_folder(tmp_path, "more", {"new.jpg": jpeg()})
    after = Shard().external(settings)
    assert before.keys() == after.keys() == {"llava", "photos 0"}
    assert before["photos 0"] != after["photos 0"]


def test_photos_and_annotations_are_read_from_s3_zips_and_tars_too(s3_root: str, tmp_path: Path) -> None:
    files = photos(6)
    settings = coco(tmp_path / "data", files)
    in_zip(tmp_path / "data", "images", dict(list(files.items())[:3]))
    in_tar(tmp_path / "data", "more", dict(list(files.items())[3:]))
    store = open_store(f"{s3_root}/data")
    for path in (tmp_path / "data").rglob("*.*"):
        store.upload(path, path.relative_to(tmp_path / "data").as_posix())
    settings = settings.model_copy(update={"path": store.uri, "roots": (f"{store.uri}/more.tar",)})
    assert bytes_of(settings) == list(files.values())
    records = llava(
        tmp_path / "mix", files, "mix.jsonl", roots=(f"{store.uri}/images.zip", f"{store.uri}/more.tar")
    )
    mix = open_store(f"{s3_root}/mix")
    mix.upload(tmp_path / "mix" / "mix.jsonl", "mix.jsonl")
    assert bytes_of(records.model_copy(update={"path": mix.uri})) == list(files.values())


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "../secret.jpg", "a/../../secret.jpg", "s3://other-bucket/a.jpg", "file:///etc/passwd",
        "a//b.jpg", "", ".", "a\\..\\b.jpg", "nul\0.jpg", "half\ud800.jpg", "x" * 300 + ".jpg", "d/" * 600 + "a.jpg",
    ],
)  # fmt: skip
def test_an_image_path_that_leads_elsewhere_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    in_folder(tmp_path / "data", "images", photos(1))
    assert told(llava(tmp_path / "data", [path])) == {"r0": "image-path"}


def test_what_an_archive_may_not_hold_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with tarfile.open(data / "in.tar", "w") as archive:
        for name, kind in (
            ("soft.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        large = tarfile.TarInfo("large.jpg")
        large.size = 300_000
        archive.addfile(large, io.BytesIO(bytes(300_000)))
    with zipfile.ZipFile(data / "images.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(link, "/etc/passwd")
        packed.writestr("bomb.jpg", bytes(50_000_000))
        packed.writestr("lzma.jpg", jpeg(), zipfile.ZIP_LZMA)
        packed.writestr("liar.jpg", bytes(3000))
        packed.writestr("stored.jpg", jpeg(), zipfile.ZIP_STORED)
        for name in ("wide.jpg", "end.jpg", "after.jpg", "far.jpg"):
            packed.writestr(name, jpeg())
        huge = zipfile.ZipInfo("huge.jpg")
        huge.extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)
        packed.writestr(huge, jpeg())
        packed.writestr("rest.bin", random.Random(0).randbytes(3_000_000))
        packed.writestr("good.jpg", jpeg())
    raw = bytearray((data / "images.zip").read_bytes())
    for name, field, value in (
        ("liar.jpg", 24, 2000),  # 20: bytes packed, 24: bytes unpacked, 42: where it lies
        ("stored.jpg", 20, 2_000_000_000),
        ("wide.jpg", 20, 2_000_000),
        ("end.jpg", 42, len(raw) - 10),
        ("after.jpg", 42, len(raw) + 1),
        ("far.jpg", 42, 2**32 - 2),
        ("huge.jpg", 24, 2**32 - 1),  # the extra field has it
    ):
        table = raw.rindex(name.encode()) - 46
        raw[table + field : table + field + 4] = value.to_bytes(4, "little")
    (data / "images.zip").write_bytes(raw)
    names = ["soft", "hard", "pipe", "large", "link", "bomb", "lzma", "liar"]
    names += ["stored", "wide", "end", "after", "far", "huge", "good"]
    settings = llava(
        data, [f"{name}.jpg" for name in names], max_image_bytes=200_000, roots=(f"{data}/in.tar",)
    )
    assert list(told(settings).values()) == [
        "link", "link", "link", "too-many-bytes", "link", "too-many-bytes", "archive-member",
        *["broken"] * 6, "too-many-bytes", "",
    ]  # fmt: skip


def test_a_zip_that_begins_later_than_it_says_has_members_before_its_beginning(tmp_path: Path) -> None:
    settings = llava(tmp_path, ["a.jpg", "b.jpg"])
    in_zip(tmp_path, "images", {"a.jpg": jpeg(), "b.jpg": jpeg(colour=1)})
    raw = bytearray((tmp_path / "images.zip").read_bytes())
    end = raw.rindex(b"PK\5\6")
    start = int.from_bytes(raw[end + 16 : end + 20], "little") + 10
    raw[end + 16 : end + 20] = start.to_bytes(4, "little")
    (tmp_path / "images.zip").write_bytes(raw)
    assert list(told(settings).values()) == ["broken", "broken"]


@pytest.mark.parametrize("size", [-2048, 2**70])
def test_a_tar_with_an_impossible_size_is_refused_before_work(tmp_path: Path, size: int) -> None:
    settings = llava(tmp_path, ["a.jpg"])
    in_tar(tmp_path, "images", {"a.jpg": jpeg(), "b.jpg": jpeg()})
    raw = bytearray((tmp_path / "images.tar").read_bytes())
    second = raw.rindex(b"b.jpg")
    raw[second + 124 : second + 136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    raw[second + 148 : second + 156] = b" " * 8
    raw[second + 148 : second + 156] = b"%06o\0 " % sum(raw[second : second + 512])
    (tmp_path / "images.tar").write_bytes(raw)
    with pytest.raises(RefusedInput, match=r"images\.tar: no tar archive that can be read in place"):
        found(settings)


def test_a_photo_that_cannot_be_read_is_one_refused_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_folder(tmp_path, "images", photos(2) | {"closed.jpg": jpeg()})
    settings = llava(tmp_path, ["000.jpg", "loop.jpg", "closed.jpg", "001.jpg"])
    settings = settings.model_copy(update={"images": "images"})
    listing = SOURCES["llava"].listing(settings)
    (tmp_path / "images" / "loop.jpg").symlink_to("loop.jpg")
    fetch = FolderStore.fetch

    def closed(store: FolderStore, key: str) -> Any:
        if key.endswith("closed.jpg"):
            raise PermissionError(errno.EACCES, "Permission denied", key)
        return fetch(store, key)

    monkeypatch.setattr(FolderStore, "fetch", closed)  # root may read everything
    outcomes_ = list(outcomes(settings, listing.shared, listing.items, open_store("/nowhere")))
    assert [getattr(one, "reason", "") for one in outcomes_] == ["", "unreadable", "unreadable", ""]
    assert len(list(SOURCES["llava"].made_of(settings, listing.shared, listing.items))) == 4


@pytest.mark.parametrize("name", ["images.zip", "images.tar"])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
def test_a_damaged_archive_of_photos_is_refused_before_work(tmp_path: Path, name: str, damage: str) -> None:
    files = photos(20)
    settings = coco(tmp_path / "data", files)
    (in_zip if name.endswith(".zip") else in_tar)(tmp_path / "data", "images", files)
    whole = (tmp_path / "data" / name).read_bytes()
    bad = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "noise": whole[:1024] + b"\x07" * 4096 + whole[5120:],
    }
    if (damage, name) == ("noise", "images.zip"):
        pytest.skip("a zip's table stands at its end")
    (tmp_path / "data" / name).write_bytes(bad[damage])
    with pytest.raises(RefusedInput, match=rf"{name}: no (zip|tar) archive that can be read in place"):
        found(settings)


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


def test_records_of_one_photo_stand_together_in_the_order_of_the_file(tmp_path: Path) -> None:
    images = ["b.jpg", "a.jpg", None, "b.jpg", ["a.jpg", "b.jpg"], None, "b.jpg"]
    for name in ("mix.json", "mix.jsonl"):
        listing = SOURCES["llava"].listing(llava(tmp_path / name, images, name))
        assert [json.loads(data)["id"] for _, data in listing.items] == [
            "r0",
            "r3",
            "r6",
            "r1",
            "r4",
            "r2",
            "r5",
        ]
        assert [number for number, _ in listing.items[2:5]] == [6, 1, 4]


def test_one_bad_line_of_a_jsonl_file_is_one_refused_sample(tmp_path: Path) -> None:
    settings = llava(tmp_path, [None, None], "mix.jsonl")
    good = (tmp_path / "mix.jsonl").read_bytes().splitlines(keepends=True)
    deep = b'{"a":' * 50_000 + b"\n"
    (tmp_path / "mix.jsonl").write_bytes(
        b"\r\n".join([good[0], b"{oops", b"", b'{"id": "\xff\xfe"}', deep, b"7", good[1]])
    )
    reasons = [getattr(one, "reason", "") for one in found(settings)]
    assert reasons == ["", "no-json", "no-turns", "no-json", "no-record", ""]


# Texts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nul \0 inside", "text-nul"),
        ("half \ud83d of a pair", "text-not-unicode"),
        ("other half \udc00", "text-not-unicode"),
        ("x" * 1_000_000, "text-too-long"),
        ("an <image> in the answer", ""),
        ("</s> [/INST] <|im_end|> ASSISTANT: ###", ""),
        ("a whole pair \U0001f600", ""),
        ("line\r\nline\u2028line\x1b[31m", ""),
        ("\u202ebackwards and ‍ joined", ""),
        ("", ""),
    ],
)
def test_every_text_has_one_defined_result(tmp_path: Path, text: str, reason: str) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": text}]
    (tmp_path / "mix.json").write_text(json.dumps([{"id": "r", "conversations": turns}]))
    (outcome,) = found(ShardSettings(source="llava", path=str(tmp_path), heldout=0))
    if reason:
        assert (outcome.name, outcome.reason) == ("r", reason)
        assert len(str(outcome)) < 500
    else:
        assert outcome.row["conversations"][1]["value"] == text


def test_a_bad_caption_is_left_out_and_counted_and_the_photo_stays_with_the_others(tmp_path: Path) -> None:
    files = photos(3)
    settings = coco(tmp_path / "data", files)
    in_folder(tmp_path / "data", "images", files)
    path = tmp_path / "data" / "annotations" / "captions.json"
    table = json.loads(path.read_text())
    bad = ["\ud800", "a\0b", "word " * 200_000]
    table["annotations"] += [{"image_id": 0, "caption": caption} for caption in bad]
    table["annotations"][1]["caption"] = "\udfff"
    table["annotations"][2]["caption"] = " \n "
    path.write_text(json.dumps(table))
    first, second, third = found(settings)
    assert first.row["captions"] == ["photo 000.jpg"]
    assert sorted(first.counts) == [
        "captions-left-out/text-not-unicode", "captions-left-out/text-nul", "captions-left-out/text-too-long"
    ]  # fmt: skip
    assert (second.reason, third.reason) == ("text-not-unicode", "no-caption")


@pytest.mark.parametrize("name", ["x" * 5000, "half \ud800", "nul\0", {"a": 1}, ["\ud800"]])
def test_a_hostile_id_is_refused_under_a_name_that_can_be_written(tmp_path: Path, name: Any) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]
    (tmp_path / "mix.json").write_text(json.dumps([{"id": name, "conversations": turns}]))
    (outcome,) = found(ShardSettings(source="llava", path=str(tmp_path), heldout=0))
    if isinstance(outcome, RefusedSample):
        assert outcome.name.encode() and len(outcome.name) <= 201 and outcome.name.isprintable()
    else:
        assert outcome.row["id"] == str(name)


# Shrinking


def test_photos_are_shrunk_where_the_settings_say_so_and_their_boxes_with_them(tmp_path: Path) -> None:
    files = {"large.jpg": jpeg(400, wide=600), "small.jpg": jpeg(90)}
    settings = coco(tmp_path / "data", files)
    in_folder(tmp_path / "data", "images", files)
    boxes = {
        "images": [{"id": 0, "file_name": "large.jpg"}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 0, "category_id": 1, "bbox": [60, 40, 300, 200]}],
    }
    (tmp_path / "data" / "annotations" / "instances.json").write_text(json.dumps(boxes))
    large, small = found(settings.model_copy(update={"resize": 100}))
    assert (large.row["width"], large.row["height"]) == decode(large.row["image"]["bytes"]).size == (150, 100)
    assert large.row["objects"] == [{"category": "cat", "bbox": pytest.approx([15, 10, 75, 50])}]
    assert large.counts == ("photos/resized",)
    assert small.row["image"]["bytes"] == files["small.jpg"]
    assert small.counts == ()


# webdataset, img2dataset


def wds(count: int, start: int = 0) -> Files:
    files: Files = {}
    for number in range(start, start + count):
        name = f"{number:05d}"
        files[f"{name}.jpg"] = jpeg(colour=number)
        files[f"{name}.txt"] = f"photo {name}\n".encode()
        files[f"{name}.json"] = json.dumps({"caption": "another", "url": "http://x"}).encode()
    return files


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_tars_of_samples_are_read_from_front_to_back(tmp_path: Path, mode: str) -> None:
    in_tar(tmp_path, "00000", wds(5), mode)
    in_tar(tmp_path, "00001", wds(4, start=5), mode)
    in_folder(tmp_path, ".", {"00000_stats.json": b"{}"})
    settings = ShardSettings(source="webdataset", path=str(tmp_path), heldout=0)
    rows = [one.row for one in found(settings)]
    assert [row["id"] for row in rows] == [f"{number:05d}" for number in range(9)]
    assert [row["captions"] for row in rows] == [[f"photo {number:05d}"] for number in range(9)]
    assert [row["image"]["bytes"] for row in rows] == [jpeg(colour=number) for number in range(9)]
    chosen = settings.model_copy(update={"files": "*1.tar*"})
    assert [one.row["id"] for one in found(chosen)] == [f"{number:05d}" for number in range(5, 9)]


def test_each_sample_of_a_tar_that_is_no_pair_has_its_reason(tmp_path: Path) -> None:
    good = wds(1)
    files: Files = {
        "no-text.jpg": jpeg(),
        "by-json.png": jpeg(),
        "by-json.json": b'{"caption": "told"}',
        "bad-json.jpg": jpeg(),
        "bad-json.json": b"{oops",
        "no-image.txt": b"text alone",
        "other.cls": b"7",
        "two.jpg": jpeg(),
        "two.png": jpeg(),
        "two.txt": b"two",
        "again.txt": b"one",
        "dir/again.txt": b"another",
        "page.jpg": b"<html>",
        "page.txt": b"page",
        "latin.jpg": jpeg(),
        "latin.txt": b"caf\xe9",
        "long.jpg": jpeg(),
        "long.txt": b"x" * 2_000_000,
        "huge.jpg": bytes(500_000),
        "huge.txt": b"huge",
        "UPPER.JPG": jpeg(),
        "UPPER.TXT": b"large letters",
    }
    in_tar(tmp_path, "00000", files | good)
    settings = ShardSettings(source="webdataset", path=str(tmp_path), heldout=0, max_image_bytes=400_000)
    assert told(settings) == {
        "no-text": "no-caption", "by-json": "", "bad-json": "no-json", "no-image": "image-missing",
        "other": "image-missing", "two": "several-images", "again": "image-missing", "dir/again": "image-missing",
        "page": "unknown-format", "latin": "text-not-unicode", "long": "text-too-long", "huge": "too-many-bytes",
        "UPPER": "", "00000": "",
    }  # fmt: skip


def test_links_in_a_tar_of_samples_are_never_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("s.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
    assert told(ShardSettings(source="webdataset", path=str(tmp_path))) == {"s": "link", "h": "link"}


def hostile_name() -> bytes:
    """A tar header that announces a name of 8 GB."""
    header = tarfile.TarInfo("a")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**33 - 1
    return header.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("damage", ["cut", "noise", "name", "empty", "half-gzip"])
def test_a_damaged_tar_gives_what_stands_before_the_damage_and_says_so(tmp_path: Path, damage: str) -> None:
    in_tar(tmp_path, "whole", wds(20))
    whole = (tmp_path / "whole.tar").read_bytes()
    in_tar(tmp_path, "packed", wds(20), "w:gz")
    packed = (tmp_path / "packed.tar.gz").read_bytes()
    (tmp_path / "whole.tar").unlink()
    (tmp_path / "packed.tar.gz").unlink()
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        edge = archive.getmember("00010.jpg").offset
    bad = {
        "cut": whole[: edge + 700],
        "noise": whole[:edge] + b"\x07" * 2048,
        "name": whole[:edge] + hostile_name() + bytes(1024),
        "empty": b"",
        "half-gzip": packed[: len(packed) // 2],
    }
    (tmp_path / "bad.tar").write_bytes(bad[damage])
    outcomes_ = found(ShardSettings(source="webdataset", path=str(tmp_path), heldout=0))
    *good, last = outcomes_
    assert last.reason == "broken-tar"
    assert "bad.tar" in last.name
    if damage in ("noise", "name"):
        assert [one.row["id"] for one in good] == [f"{number:05d}" for number in range(10)]


def test_small_tars_share_a_shard_and_a_large_one_is_never_cut(tmp_path: Path) -> None:
    for name, samples in (("a", 2), ("b", 2), ("c", 9), ("d", 2)):
        in_tar(tmp_path, name, wds(samples))
    listing = SOURCES["webdataset"].listing(ShardSettings(source="webdataset", path=str(tmp_path)))
    shards = ["".join(file.key[0] for file in items) for items, _ in listing.shards(8)]
    assert "".join(shards) == "abcd"
    assert {"ab", "c"} <= set(shards)


def test_a_tar_becomes_a_shard_and_the_share_of_refused_samples_is_judged_at_the_end(
    run_in: Any, s3_root: str, tmp_path: Path
) -> None:
    in_tar(tmp_path, "a", wds(6))
    in_tar(tmp_path, "b", {**wds(3, start=6), "x.txt": b"no picture"})
    store = open_store(f"{s3_root}/tars")
    for name in ("a.tar", "b.tar"):
        store.upload(tmp_path / name, name)
    settings = ShardSettings(source="webdataset", path=store.uri, heldout=0, rows_per_shard=2, max_bad=0.11)
    artifact = run_in(Shard(), settings).artifact
    files = sorted(artifact.local().glob("train/*.parquet"))
    assert [pq.read_table(file).column("id").to_pylist() for file in files] == [
        [f"{number:05d}" for number in range(6)], [f"{number:05d}" for number in range(6, 9)]
    ]  # fmt: skip
    assert artifact.manifest.notes["refused"] == {"image-missing": {"count": 1, "ids": ["x"]}}
    with pytest.raises(
        LlavaError, match=r"1 of 10 samples refused, limit shard\.max_bad=0\.09: 1 x image-missing \("
    ):
        run_in(Shard(), settings.model_copy(update={"max_bad": 0.09}), root=tmp_path / "stricter")


def test_img2datasets_parquet_is_read_where_no_tar_lies(tmp_path: Path) -> None:
    files = list(photos(4).values())
    table = pa.table(
        {
            "url": ["http://x"] * 5,
            "key": [f"{number:09d}" for number in range(5)],
            "status": ["success"] * 4 + ["failed_to_download"],
            "caption": [f"photo {number}" for number in range(5)],
            "jpg": pa.array([*files, None], pa.binary()),
        }
    )
    pq.write_table(table, tmp_path / "00000.parquet", row_group_size=2)
    pq.write_table(table.drop_columns(["jpg"]), tmp_path / "00001.parquet")
    settings = ShardSettings(source="webdataset", path=str(tmp_path), heldout=0)
    *rows, last = found(settings)
    assert [one.row["image"]["bytes"] for one in rows] == files
    assert rows[3].row["captions"] == ["photo 3"]
    assert (last.name, last.reason) == ("000000004", "image-missing")


# Hugging Face datasets


def test_what_datasets_writes_is_read_and_what_is_written_datasets_reads(run_in: Any, tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    files = list(photos(6).values())
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "text": datasets.Value("string"),
            "more": datasets.List(datasets.Value("string")),
        }
    )
    given = datasets.Dataset.from_dict(
        {
            "picture": [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(files)],
            "text": [f"photo {n}" for n in range(6)],
            "more": [[f"again {n}", "  "] for n in range(6)],
        },
        features=features,
    )
    (tmp_path / "hf").mkdir()
    given.to_parquet(tmp_path / "hf" / "train-00000-of-00001.parquet", batch_size=4)
    settings = ShardSettings(
        source="parquet", path=str(tmp_path / "hf"), texts=("text", "more"), heldout=0, rows_per_shard=4
    )
    artifact = run_in(Shard(), settings).artifact
    ours = sorted(str(file) for file in artifact.local().glob("train/*.parquet"))
    read = datasets.load_dataset("parquet", data_files=ours, split="train", cache_dir=str(tmp_path / "cache"))
    assert read["captions"][:] == [[f"photo {n}", f"again {n}"] for n in range(6)]
    assert [picture.size for picture in read["image"]] == [(40, 40)] * 6
    raw = read.cast_column("image", datasets.Image(decode=False))
    assert [one["bytes"] for one in raw["image"]] == files

    (tmp_path / "again").mkdir()
    read.to_parquet(tmp_path / "again" / "data.parquet")
    back = ShardSettings(source="parquet", path=str(tmp_path / "again"), texts=("captions",), heldout=0)
    rows = [one.row for one in found(back)]
    assert [row["image"]["bytes"] for row in rows] == files
    assert [row["id"] for row in rows] == read["id"][:]
    assert [row["captions"] for row in rows] == read["captions"][:]


def test_conversations_and_several_pictures_of_a_parquet_file_are_kept(tmp_path: Path) -> None:
    first, second = photos(2).values()
    turns = [{"from": "human", "value": "<image> <image>?"}, {"from": "gpt", "value": "Both."}]
    alone = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hi."}]
    images = [[{"bytes": first, "path": None}, {"bytes": second, "path": "b.jpg"}], [], None]
    table = pa.table({"images": images, "conversations": [turns, alone, turns]})
    pq.write_table(table, tmp_path / "a.parquet")
    settings = ShardSettings(
        source="parquet", path=str(tmp_path), image_columns=("images",), texts=("conversations",), heldout=0
    )
    pair, text, bad = found(settings)
    assert pair.row["image"]["bytes"] == first
    assert pair.row["more_images"] == [{"bytes": second, "path": "b.jpg"}]
    assert [pair.row["id"], text.row["id"]] == ["a-0", "a-1"]
    assert text.row["conversations"] == alone
    assert bad.reason == "slot-without-image"


def test_a_picture_that_is_only_a_path_is_refused_and_never_opened(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    cells = [{"bytes": None, "path": str(tmp_path / "secret.jpg")}, {"bytes": jpeg(), "path": "/etc/passwd"}]
    (tmp_path / "data").mkdir()
    table = pa.table(
        {
            "image": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "text": pa.StringArray.from_buffers(
                2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\5\0\0\0"), pa.py_buffer(b"acaf\xe9")
            ),
        }
    )
    pq.write_table(table, tmp_path / "data" / "a.parquet")
    settings = ShardSettings(source="parquet", path=str(tmp_path / "data"), texts=("text",), heldout=0)
    assert told(settings) == {"a-0": "path-without-bytes", "a-1": "text-not-unicode"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": ("nothing",)}, r"shard\.texts: .* has no column 'nothing'; there are a, b, text, number"),
        ({"texts": ("number",)}, r"shard\.texts: column 'number' .* is int64"),
        ({"texts": ("text",)}, r"pictures in a, b; choose in shard\.image_columns"),
        ({"texts": ("text",), "image_columns": ("text",)}, r"shard\.image_columns: column 'text'"),
        ({"texts": ("text",), "image_columns": ("a",), "id_column": "no"}, r"shard\.id_column"),
        ({"texts": ("text",), "files": "x*"}, "no file is named like x"),
    ],
)
def test_columns_that_cannot_be_right_are_refused_with_the_key(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    picture = pa.array([{"bytes": jpeg(), "path": "x"}])
    pq.write_table(
        pa.table({"a": picture, "b": picture, "text": ["t"], "number": [1]}), tmp_path / "a.parquet"
    )
    with pytest.raises(RefusedInput, match=message):
        found(ShardSettings(source="parquet", path=str(tmp_path), **options))


def test_a_damaged_parquet_file_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(RefusedInput, match=r"a\.parquet is no Parquet file that can be read"):
        found(ShardSettings(source="parquet", path=str(tmp_path), texts=("text",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "parquet", "path": "x"}, "source=parquet needs texts"),
        (
            {"source": "coco", "path": "x", "allow_private": True},
            "allow_private is for source=cc3m, not coco",
        ),
        (
            {"source": "cc3m", "path": "x", "roots": ["y"]},
            "roots is for source=coco and source=llava, not cc3m",
        ),
    ],
)
def test_settings_of_another_source_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ShardSettings(**settings)


def test_items_that_are_files_are_cut_into_shards_by_their_samples() -> None:
    listing = base.Listing(list("abcdef"), sizes=[3, 3, 9, 1, 1, 4])
    assert [("".join(items), samples) for items, samples in listing.shards(6)] == [
        ("ab", 6), ("c", 9), ("def", 6)
    ]  # fmt: skip
