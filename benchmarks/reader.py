"""Reading pictures back, shuffled, to uint8: ours against `datasets` streaming, webdataset and mosaicml-streaming.

Photo-like JPEGs with a short side of 336 px become (3, 336, 336) uint8 arrays, the same on every side: ours through
`llava.pixels.Pixels`, the others' through the stock image processor, as their users do it; one line shows what
webdataset gains with our `Pixels`. Order, reading and decoding are each side's own. `datasets` reads the very Parquet
files that we read, webdataset and mosaicml-streaming have the same JPEGs in their own format. Interleaved, every side
in a fresh process per round; the process's CPU time counts, with its threads and ended children. Shuffle buffers hold
1,000 pictures.

From S3 too where `weed` (SeaweedFS) is installed: webdataset reads presigned URLs through `pipe:curl`,
`datasets` the same over HTTP, mosaicml-streaming its own `s3://`.

mosaicml-streaming asks for older versions of numpy and transformers than ours, and for torchvision, of which it uses
nothing here: install it elsewhere (`pip install --no-deps --target PEERS`) and name the folder with `--peers`.

Then, of our side alone: what one row group costs to read from S3 at several sizes; the row groups that 8 ranks read
over those needed; the share of a training step of `tiny` that waits for data.

    python benchmarks/reader.py --markdown benchmarks/results/reader.md
    python benchmarks/reader.py --images 600 --rounds 1 --json
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.data_plane.photos import files, make_photos
from benchmarks.data_plane.server import S3, s3_server
from benchmarks.data_plane.sides import (
    Clock,
    Measured,
    absent,
    command,
    found_version,
    rotate,
    run_side,
    table,
)

SIZE = (448, 336)
EDGE = 336
PER_SHARD = 1000
BUFFER = 1000
BATCH = 32
PACKAGES = ("pyarrow", "pillow", "torch", "datasets", "webdataset", "mosaicml-streaming")
A_CORE, WAITING, READ_TWICE = 500.0, 0.02, 1.5


def ours(place: str, count: int) -> Iterator[np.ndarray]:
    """`ParquetRows` in the order of a `BatchPlan`, a few row groups ahead."""
    from components.contract import open_store
    from llava.data.images import decode
    from llava.data.order import epoch_order
    from llava.data.reader import ParquetRows

    store = open_store(f"{place}/ours")
    filesystem, base = store.arrow()
    keys = sorted(entry.key for entry in store.list() if entry.key.endswith(".parquet"))
    rows = ParquetRows(filesystem, [f"{base}/{key}" for key in keys], ["id", "image"])
    sizes = [size for _, _, size in rows.groups]
    group, row = np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(size) for size in sizes])
    order = epoch_order(group, np.ones(len(group), np.int64), seed=0, epoch=0, window=WINDOW).order
    pixels = _pixels()
    for number, index in enumerate(order.tolist()):
        if number % BATCH == 0:
            ahead = list(dict.fromkeys(group[order[number : number + WINDOW * BATCH]].tolist()))
            rows.prefetch(ahead)
            rows.keep_only(ahead)
        cells = rows.row(int(group[index]), int(row[index]))
        yield pixels(decode(cells["image"]["bytes"]))


def hugging_face(place: str, count: int) -> Iterator[np.ndarray]:
    """`load_dataset(streaming=True)` with a shuffle buffer."""
    import datasets

    pattern = json.loads(os.environ["URLS"])["ours"] if "URLS" in os.environ else f"{place}/ours/*.parquet"
    stream = datasets.load_dataset("parquet", data_files=pattern, split="train", streaming=True)
    pixels = _stock_pixels()
    for row in stream.select_columns(["id", "image"]).shuffle(seed=0, buffer_size=BUFFER):
        yield pixels(row["image"].convert("RGB"))


def web(place: str, count: int) -> Iterator[np.ndarray]:
    """`WebDataset` with a shuffle buffer."""
    return _web(place, _stock_pixels())


def web_with_our_pixels(place: str, count: int) -> Iterator[np.ndarray]:
    """The same, the stock image processor replaced."""
    return _web(place, _pixels())


def _web(place: str, pixels: Callable[[Any], np.ndarray]) -> Iterator[np.ndarray]:
    import webdataset

    if "URLS" in os.environ:
        urls = [f"pipe:curl -s '{url}'" for url in json.loads(os.environ["URLS"])["web"]]
    else:
        urls = sorted(str(path) for path in Path(place, "web").glob("*.tar"))
    stream = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(BUFFER).decode("pil")
    for sample in stream:
        yield pixels(sample["jpg"].convert("RGB"))


def mosaic(place: str, count: int) -> Iterator[np.ndarray]:
    """`StreamingDataset(shuffle=True)`; from S3 through a local copy, as it is made to be used."""
    import streaming

    with tempfile.TemporaryDirectory() as cache:
        where = (
            {"remote": f"{place}/mosaic", "local": cache} if "://" in place else {"local": f"{place}/mosaic"}
        )
        stream = streaming.StreamingDataset(**where, shuffle=True, shuffle_seed=0, batch_size=BATCH)
        pixels = _stock_pixels()
        for sample in stream:
            yield pixels(sample["image"].convert("RGB"))


WINDOW = 8
Side = Callable[[str, int], Iterator[np.ndarray]]
SIDES: dict[str, tuple[Side, str, tuple[str, ...], tuple[str, ...]]] = {
    "ours": (ours, "`ParquetRows` in a plan's order", (), ("boto3", "components.contract", "llava.data.reader")),
    "datasets": (hugging_face, "`load_dataset(streaming=True).shuffle`", ("datasets",), ("datasets",)),
    "webdataset": (web, "`WebDataset(...).shuffle`", ("webdataset",), ("webdataset",)),
    "webdataset, our pixels": (
        web_with_our_pixels, "the same, without the stock image processor", ("webdataset",), ("webdataset",)
    ),
    "mosaicml-streaming": (
        mosaic, "`StreamingDataset(shuffle=True)`", ("mosaicml-streaming",), ("streaming",)
    ),
}  # fmt: skip
"""Name: the function, what it is in words, the packages that it needs, the modules to import before the clock."""


def _pixels() -> Any:
    from PIL import Image

    from llava.pixels import Pixels

    pixels = Pixels(_processor())
    pixels(Image.new("RGB", SIZE))  # it tries itself out once
    return pixels


def _processor() -> Any:
    from transformers import CLIPImageProcessorPil

    size = {"size": {"shortest_edge": EDGE}, "crop_size": {"height": EDGE, "width": EDGE}}
    return CLIPImageProcessorPil(**size)


def _with_peers(options: argparse.Namespace) -> None:
    """Look for packages in `--peers` too, but only after transformers was imported without them."""
    if options.peers:
        _processor()
        sys.path.append(str(options.peers))


def _stock_pixels() -> Callable[[Any], np.ndarray]:
    processor = _processor()

    def pixels(image: Any) -> np.ndarray:
        out = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
        return np.asarray(out["pixel_values"][0])

    return pixels


def make_shards(folder: Path, photos: Path, count: int) -> None:
    """The same JPEGs in every side's format."""
    from llava.data.schema import DatasetWriter

    listed = list(files(photos, count))
    (folder / "ours").mkdir(parents=True)
    for part, start in enumerate(range(0, count, PER_SHARD)):
        with DatasetWriter(folder / "ours" / f"part-{part:05d}.parquet") as writer:
            for name, file, texts in listed[start : start + PER_SHARD]:
                image: Any = {"bytes": file.read_bytes(), "path": file.name}
                writer.write({"id": name, "image": image, "captions": texts})
    if found_version("webdataset"):
        import webdataset

        (folder / "web").mkdir()
        with webdataset.ShardWriter(str(folder / "web" / "%05d.tar"), maxcount=PER_SHARD, verbose=0) as sink:
            for name, file, texts in listed:
                sink.write({"__key__": name, "jpg": file.read_bytes(), "json": {"captions": texts}})
    if found_version("mosaicml-streaming"):
        import streaming
        from PIL import Image

        columns = {"id": "str", "image": "jpeg", "captions": "json"}
        with streaming.MDSWriter(out=str(folder / "mosaic"), columns=columns, size_limit=2**26) as out:
            for name, file, texts in listed:
                # A picture that was opened from a file is stored with the file's own bytes.
                out.write({"id": name, "image": Image.open(file), "captions": texts})


def side(options: argparse.Namespace) -> None:
    """One side, once: imports and the processor first, then the clock."""
    _with_peers(options)
    for module in SIDES[options.side][3]:
        import_module(module)
    import torch

    torch.set_num_threads(1)
    _pixels()
    clock, first, seen, total = Clock(), 0.0, 0, 0
    for picture in SIDES[options.side][0](options.place, options.images):
        assert picture.shape == (3, EDGE, EDGE)
        seen += 1
        total += int(picture[0, 0, 0])
        if seen == BATCH:
            first = time.perf_counter() - clock.wall
    if seen != options.images:
        raise SystemExit(f"{seen} pictures, expected {options.images}")
    print(json.dumps(clock.read(seen, first_batch=first, check=total)))


def row_groups(server: S3, folder: Path, photos: Path, count: int) -> list[dict[str, float]]:
    """Seconds and requests for reading each row group once from S3, at several rows per group."""
    from components.contract import open_store
    from llava.data.reader import ParquetRows
    from llava.data.schema import DatasetWriter, GroupSize

    found = []
    for rows in (16, 64, 256, 1024):
        path = folder / f"rows-{rows}.parquet"
        with DatasetWriter(path, GroupSize(rows=rows)) as writer:
            for name, file, texts in files(photos, min(count, 1024)):
                image: Any = {"bytes": file.read_bytes(), "path": file.name}
                writer.write({"id": name, "image": image, "captions": texts})
        store = open_store(f"{server.root}/groups")
        store.upload(path, path.name)
        filesystem, base = store.arrow()
        reader = ParquetRows(filesystem, [f"{base}/{path.name}"], ["id", "image", "captions"])
        began = time.perf_counter()
        seconds = []
        for group in range(len(reader.groups)):
            started = time.perf_counter()
            reader.table(group)
            seconds.append(time.perf_counter() - started)
        size = path.stat().st_size
        found.append(
            {
                "rows": rows,
                "bytes": size / len(reader.groups),
                "seconds": float(np.median(seconds)),
                "bytes_per_second": size / (time.perf_counter() - began),
            }
        )
    return found


def ranks_read(ranks: int = 8) -> dict[str, float]:
    """Row groups that `ranks` ranks read in an epoch over those there are: 128 row groups of 256 rows."""
    from llava.data.plan import BatchPlan, SampleIndex

    groups, rows = 128, 256
    random = np.random.default_rng(0)
    tokens = np.clip(random.lognormal(5, 0.6, groups * rows), 50, 600).astype(np.int64) + 576
    ones = np.ones(groups * rows, np.int64)
    numbers = np.arange(groups * rows)
    index = SampleIndex(numbers // rows, numbers % rows, 0 * ones, tokens, tokens - 576, ones)
    found = {}
    for batch in (32, 64, 128, 256):
        plan = BatchPlan(index, seed=0, epochs=1, global_batch=batch)
        read: set[tuple[int, int]] = set()
        for step in range(plan.steps):
            chosen = plan.samples(step)
            for rank, placed in enumerate(plan.place(step, ranks, 4096)):
                read |= {(rank, int(index.group[chosen[one]])) for row in placed for one in row}
        found[f"global batch {batch}"] = len(read) / groups
    return found


def waiting(steps: int = 40) -> dict[str, float]:
    """The share of a step of `tiny` (stage 2, its towers, on the CPU) that waits for data."""
    import torch

    from benchmarks.training_step.shapes import make_world, shape_of
    from benchmarks.training_step.sides import collator_of, engine_of, prepare
    from llava.attention import packing_attention
    from llava.training.engine import AdamW
    from llava.training.loop import Schedule, StepReport, train

    torch.set_num_threads(1)
    reports: list[StepReport] = []
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(shape_of("tiny"), 2, steps, 0, Path(folder), torch.device("cpu"), torch.float32)
        prepare(world, packing_attention("auto"), False)
        engine = engine_of(world, AdamW(weight_decay=0.0))

        def keep(report: StepReport) -> bool:
            reports.append(report)
            return False

        train(engine, collator_of(world), Schedule(steps, 1e-4, 0.03), 0, keep)
    later = reports[2:]
    total = sum(report.seconds for report in later)
    return {"share": sum(report.data_wait for report in later) / total, "step_seconds": total / len(later)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument(
        "--peers", type=Path, help="a folder of packages that cannot stand beside transformers"
    )
    parser.add_argument("--no-s3", action="store_true", help="from the disk only")
    parser.add_argument("--place", help=argparse.SUPPRESS)
    command(parser, SIDES, side, measure, markdown)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds of all sides, from the disk and from S3, then what concerns our side alone."""
    photos, shards = options.photos or folder / "photos", folder / "shards"
    _with_peers(options)
    if len(list((photos / "images").glob("*.jpg"))) < options.images:
        make_photos(photos, options.images, SIZE)
    make_shards(shards, photos, options.images)
    report: dict[str, Any] = {
        "command": f"benchmarks/reader.py --images {options.images} --rounds {options.rounds}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), **{name: found_version(name) for name in PACKAGES}},
        "images": options.images,
        "disk": _compare(options, str(shards), {}),
    }
    with nullcontext() if options.no_s3 else s3_server(folder / "s3") as server:
        if server:
            urls = {"URLS": json.dumps(server.upload(shards)), **server.env}
            os.environ.update(server.env)
            report["s3"] = _compare(options, f"{server.root}/shards", urls)
            report["row_groups"] = row_groups(server, folder, photos, options.images)
    report["ranks"] = ranks_read()
    report["waiting"] = waiting()
    report["targets"] = targets(report)
    return report


def _compare(options: argparse.Namespace, place: str, env: dict[str, str]) -> list[dict[str, Any]]:
    sides = [Measured(name, what, absent=absent(*needed)) for name, (_, what, needed, _) in SIDES.items()]

    def run(one: Measured) -> dict[str, Any]:
        arguments = ["--place", place, "--images", str(options.images)]
        return run_side(
            __file__, one.name, [*arguments, *(["--peers", str(options.peers)] * bool(options.peers))], env
        )

    rotate(sides, options.rounds, run)
    return [one.as_json() for one in sides]


def targets(report: dict[str, Any]) -> dict[str, bool]:
    """What was asked for, and whether it holds."""
    found = {}
    for where in ("disk", "s3"):
        if where in report:
            pace = {one["name"]: one.get("images_per_cpu_second", 0.0) for one in report[where]}
            others = [pace[name] for name in ("datasets", "webdataset", "mosaicml-streaming") if pace[name]]
            if others:
                found[f"{where}: ahead of {len(others)} others as their users run them"] = pace["ours"] > max(
                    others
                )
    found[f"at least {A_CORE:.0f} images a second and core"] = (
        report["disk"][0]["images_per_cpu_second"] >= A_CORE
    )
    for batch, read in report["ranks"].items():
        found[f"8 ranks read at most {READ_TWICE} x what is needed, {batch}"] = read <= READ_TWICE
    found[f"under {WAITING:.0%} of a step of tiny waits for data"] = report["waiting"]["share"] < WAITING
    return found


def markdown(report: dict[str, Any]) -> str:
    """The result as a page."""
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items() if found)
    rounds = len(report["disk"][0]["rounds"])
    lines = [
        "# Reading pictures back, shuffled",
        "",
        f"`python {report['command']}`, {report['date']}, {os.cpu_count()} cores, {versions}.",
        f"{report['images']:,} JPEGs of {SIZE[0]} x {SIZE[1]} to (3, {EDGE}, {EDGE}) uint8; "
        f"medians of {rounds} rounds.",
        "",
    ]
    head = [
        "side",
        "what",
        "images per CPU second",
        "images per second",
        f"first {BATCH}, seconds",
        "peak memory",
    ]
    for where, title in (("disk", "From the disk"), ("s3", "From S3")):
        if where not in report:
            continue
        rows = []
        for one in report[where]:
            if "rounds" not in one:
                rows.append([one["name"], one["what"], one["absent"], "", "", ""])
                continue
            pace = [f"{one['images_per_cpu_second']:,.0f}", f"{one['images'] / one['wall']:,.0f}"]
            rows.append(
                [
                    one["name"],
                    one["what"],
                    *pace,
                    f"{one['first_batch']:.2f}",
                    f"{one['peak'] / 2**20:,.0f} MiB",
                ]
            )
        lines += [f"## {title}", "", table(head, rows), ""]
    if "row_groups" in report:
        rows = [
            [
                f"{one['rows']:.0f}", f"{one['bytes'] / 2**20:.1f} MiB", f"{1000 * one['seconds']:.1f} ms",
                f"{one['bytes_per_second'] / 2**20:,.0f} MiB/s",
            ]
            for one in report["row_groups"]
        ]  # fmt: skip
        lines += ["## A row group from S3", "", table(["rows", "size", "time for one", "pace"], rows), ""]
    read = ", ".join(f"{share:.2f} at {name}" for name, share in report["ranks"].items())
    wait = report["waiting"]
    lines += [
        f"Row groups that 8 ranks read over those needed: {read}.",
        "",
        f"A step of tiny takes {wait['step_seconds']:.2f} s; {wait['share']:.2%} of it waits for data.",
        "",
        *(f"- {name}: {'met' if met else 'MISSED'}" for name, met in report["targets"].items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
