"""Data folders for the sources of `shard`, and what a source makes of them without Ray."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from components.contract.store import open_store
from components.shard import ShardSettings
from components.shard.sources import SOURCES, outcomes
from components.shard.sources.base import RefusedSample

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


# webdataset, img2dataset


def wds(count: int, start: int = 0) -> Files:
    files: Files = {}
    for number in range(start, start + count):
        name = f"{number:05d}"
        files[f"{name}.jpg"] = jpeg(colour=number)
        files[f"{name}.txt"] = f"photo {name}\n".encode()
        files[f"{name}.json"] = json.dumps({"caption": "another", "url": "http://x"}).encode()
    return files
