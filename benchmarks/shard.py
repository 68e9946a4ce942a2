"""From photos to shards: ours against Hugging Face `datasets` and webdataset.

Photo-like JPEGs are made on the spot. Two comparisons, both interleaved, every side in a fresh process per round:

- checked: every picture is decoded once, to prove it whole, and its size is stored beside it. That is what
  `llava shard` does; `datasets` does it with `map`, webdataset's user before `write`.
- as it comes: bytes in, shards out, nobody looks at a picture.

The process's CPU time counts, threads and ended children included. Ours is what a Ray worker runs for each shard, one
after the other; Ray itself stands aside. Memory is the peak of the process.

    python benchmarks/shard.py --markdown benchmarks/results/shard.md
    python benchmarks/shard.py --images 1000 --rounds 1 --json
"""

import argparse
import io
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.data_plane.photos import files, make_photos, name_of, write_captions
from benchmarks.data_plane.sides import (
    Clock,
    Measured,
    absent,
    command,
    folder_bytes,
    found_version,
    rotate,
    run_side,
    table,
)  # fmt: skip

SIZE = (640, 480)
PER_SHARD = 1000
PACKAGES = ("pyarrow", "pillow", "datasets", "webdataset")
AGAINST_DATASETS = 1.5
FLAT = 64 * 2**20
"""Bytes that ten times the rows may add to a worker's memory, in which the driver's list is counted here."""
A_WORKER = 2**30

Listed = list[tuple[str, Path, list[str]]]
"""(name, file, captions) of every photo: what a side is given."""


def ours_checked(photos: Path, out: Path, listed: Listed) -> None:
    """Every task of `llava shard`, with Ray's hand-over left out."""
    from components.datasets import tasks
    from components.shard import ShardSettings, component
    from components.shard.sources import SOURCES

    settings = ShardSettings(source="coco", path=str(photos), heldout=0, rows_per_shard=PER_SHARD)
    listing = SOURCES["coco"].listing(settings)
    for part, (items, samples) in enumerate(listing.shards(PER_SHARD)):
        arguments = (settings, listing.shared, items)
        task = tasks.ShardTask(
            f"part-{part:05d}", part, samples, component._write_shard, arguments, component._made_of
        )
        tasks._run_here(str(out), task, settings.group)


def ours_as_it_comes(photos: Path, out: Path, listed: Listed) -> None:
    """`DatasetWriter` alone."""
    from llava.data.schema import DatasetWriter

    for part, start in enumerate(range(0, len(listed), PER_SHARD)):
        with DatasetWriter(out / f"part-{part:05d}.parquet") as writer:
            for name, file, texts in listed[start : start + PER_SHARD]:
                image: Any = {"bytes": file.read_bytes(), "path": file.name}
                writer.write({"id": name, "image": image, "captions": texts})


def datasets_checked(photos: Path, out: Path, listed: Listed) -> None:
    """`map` decodes and adds the size, then as below."""

    def size(row: dict[str, Any]) -> dict[str, Any]:
        return {"width": row["image"].width, "height": row["image"].height}

    _to_parquet(_dataset(listed).map(size, cache_file_name=str(out / "cache.arrow")), out)


def datasets_as_it_comes(photos: Path, out: Path, listed: Listed) -> None:
    """The files' bytes embedded as `push_to_hub` does it, since `to_parquet` alone writes paths, then `to_parquet`."""
    _to_parquet(_dataset(listed), out)


def webdataset_checked(photos: Path, out: Path, listed: Listed) -> None:
    """Decoded before `write`."""
    from PIL import Image

    def size(data: bytes) -> dict[str, Any]:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return {"width": image.width, "height": image.height}

    _to_tars(out, listed, size)


def webdataset_as_it_comes(photos: Path, out: Path, listed: Listed) -> None:
    """Read and written."""
    _to_tars(out, listed, lambda data: {})


def _dataset(listed: Listed) -> Any:
    import datasets

    datasets.disable_progress_bars()
    names, paths, texts = zip(*listed, strict=True)
    columns = {"id": names, "image": [str(path) for path in paths], "captions": texts}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def _to_parquet(dataset: Any, out: Path) -> None:
    from datasets.table import embed_table_storage

    shards = -(-len(dataset) // PER_SHARD)
    for part in range(shards):
        shard = dataset.shard(shards, part, contiguous=True)
        embedded = shard.with_format("arrow").map(embed_table_storage, batched=True, keep_in_memory=True)
        embedded.with_format(None).to_parquet(str(out / f"part-{part:05d}.parquet"))


def _to_tars(out: Path, listed: Listed, look: Callable[[bytes], dict[str, Any]]) -> None:
    import webdataset

    with webdataset.ShardWriter(str(out / "part-%05d.tar"), maxcount=PER_SHARD, verbose=0) as sink:
        for name, file, texts in listed:
            data = file.read_bytes()
            sink.write({"__key__": name, "jpg": data, "json": {"captions": texts, **look(data)}})


SIDES: dict[str, tuple[Callable[[Path, Path, Listed], None], str]] = {
    "ours, checked": (ours_checked, "`llava shard`'s task"),
    "datasets, checked": (datasets_checked, "`map`, `embed_table_storage`, `to_parquet`"),
    "webdataset, checked": (webdataset_checked, "Pillow and `ShardWriter`"),
    "ours, as it comes": (ours_as_it_comes, "`DatasetWriter` alone"),
    "datasets, as it comes": (datasets_as_it_comes, "`embed_table_storage`, `to_parquet`"),
    "webdataset, as it comes": (webdataset_as_it_comes, "`ShardWriter`"),
}


def side(options: argparse.Namespace) -> None:
    """One side, once: imports first (pyarrow takes pandas along at its first table) and the list, then the clock."""
    module = "components.shard.component" if "ours" in options.side else options.side.partition(",")[0]
    for name in ("PIL.Image", "pandas", module):
        import_module(name)
    # What lists its source itself is given no list, which would count as its memory.
    listed = [] if options.side == "ours, checked" else list(files(options.photos, options.images))
    clock = Clock()
    SIDES[options.side][0](options.photos, options.out, listed)
    print(json.dumps(clock.read(options.images, written=folder_bytes(options.out))))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--many", type=int, default=10, help="times the rows, for memory; 0: not measured")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    command(parser, SIDES, side, measure, markdown)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds of all sides, and ours once more with many times the rows."""
    photos = options.photos or folder / "photos"
    if len(list((photos / "images").glob("*.jpg"))) < options.images:
        make_photos(photos, options.images, SIZE)
    write_captions(photos, options.images)

    def run(which: str, place: Path, count: int) -> dict[str, Any]:
        out = folder / "out"
        out.mkdir()
        try:
            arguments = ["--photos", str(place), "--out", str(out), "--images", str(count)]
            return run_side(__file__, which, arguments, {"HF_HOME": str(folder / "hf")})
        finally:
            shutil.rmtree(out)

    sides = [
        Measured(name, what, absent=absent(*[p for p in ("datasets", "webdataset") if name.startswith(p)]))
        for name, (_, what) in SIDES.items()
    ]
    rotate(sides, options.rounds, lambda one: run(one.name, photos, options.images))
    report: dict[str, Any] = {
        "command": f"benchmarks/shard.py --images {options.images} --rounds {options.rounds} --many {options.many}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), **{name: found_version(name) for name in PACKAGES}},
        "images": options.images,
        "bytes": folder_bytes(photos / "images"),
        "sides": [one.as_json() for one in sides],
    }
    if options.many:
        many = folder / "many"
        (many / "images").mkdir(parents=True)
        (many / "annotations").mkdir()
        for number in range(options.many * options.images):
            source = photos / "images" / f"{name_of(number % options.images)}.jpg"
            (many / "images" / f"{name_of(number)}.jpg").symlink_to(source.absolute())
        write_captions(many, options.many * options.images)
        found = run("ours, checked", many, options.many * options.images)
        few = sides[0].median("peak")
        report["memory"] = {"rows": [options.images, found["images"]], "peak": [few, found["peak"]]}
    report["targets"] = targets(report)
    return report


def targets(report: dict[str, Any]) -> dict[str, bool]:
    """What was asked for, and whether it holds."""
    pace = {one["name"]: one.get("images_per_cpu_second", 0.0) for one in report["sides"]}
    found = {}
    for how in ("checked", "as it comes"):
        ours, datasets, webdataset = (pace[f"{who}, {how}"] for who in ("ours", "datasets", "webdataset"))
        if datasets:
            found[f"{how}: {AGAINST_DATASETS} x datasets"] = ours >= AGAINST_DATASETS * datasets
        if webdataset:
            found[f"{how}: not behind webdataset"] = ours >= webdataset
    if memory := report.get("memory"):
        few, many = memory["peak"]
        found["memory of a worker: flat, under 1 GiB"] = many < min(A_WORKER, few + FLAT)
    return found


def markdown(report: dict[str, Any]) -> str:
    """The result as a page."""
    rows = []
    for one in report["sides"]:
        if "absent" in one and "rounds" not in one:
            rows.append([one["name"], one["what"], one["absent"], "", "", ""])
            continue
        numbers = [f"{one['images_per_cpu_second']:,.0f}", f"{one['images'] / one['wall']:,.0f}"]
        sizes = [f"{one['peak'] / 2**20:,.0f} MiB", f"{one['written'] / 2**20:,.0f} MiB"]
        rows.append([one["name"], one["what"], *numbers, *sizes])
    head = ["side", "what", "images per CPU second", "images per second", "peak memory", "written"]
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items() if found)
    lines = [
        "# From photos to shards",
        "",
        f"`python {report['command']}`, {report['date']}, {os.cpu_count()} cores, {versions}.",
        f"{report['images']:,} JPEGs of {SIZE[0]} x {SIZE[1]}, "
        f"{report['bytes'] / report['images'] / 1000:.0f} KB each; "
        f"medians of {len(report['sides'][0]['rounds'])} rounds.",
        "",
        table(head, rows),
        "",
    ]
    if memory := report.get("memory"):
        (few, many), (small, large) = memory["rows"], memory["peak"]
        lines += [
            f"Memory of one of our workers: {small / 2**20:,.0f} MiB for {few:,} rows, "
            f"{large / 2**20:,.0f} MiB for {many:,}; the list of all samples, which is the driver's, included.",
            "",
        ]
    lines += [f"- {name}: {'met' if met else 'MISSED'}" for name, met in report["targets"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
