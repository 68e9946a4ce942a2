"""How fast evaluation answers, against the reference's way; and whether a model needs the picture.

**Throughput.** The reference asks one question at a time: the stock processor, the stock `generate`, batch size one. We
ask the same questions of the same model in batches. Both sides run in this process on one core, in turns; each round
takes every question once, and the answers must be equal. CPU time is counted on the CPU, time on the wall on a GPU.

**Right against blank.** The tiny world's held-out scenes, written in each benchmark's own format, are answered by
`llava evaluate` with their pictures and with blank ones.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks.evaluation import shapes
from components.backbones.given import start_from
from components.contract import Artifact, open_store, run_component
from components.evaluate import Evaluate, EvaluateSettings, ExamSettings, exams
from components.evaluate.answering import RIGHT, Answerer, Ask, batches
from components.evaluate.contamination import find_artifact
from components.ray_cluster import connection
from components.registry import open_model
from workflows.train import open_workspace

TARGET = 3.0
NAMES = ("pope", "scienceqa", "vqa-ten", "own", "captions")


def main() -> None:
    """The command line."""
    options = parsed()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    report: dict[str, Any] = {
        "command": " ".join(["benchmarks/evaluate.py", *sys.argv[1:]]),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    workspace = open_workspace("benchmark-evaluate", options.root)
    model = start_from(options.model, None, workspace).artifact
    with tempfile.TemporaryDirectory(prefix="llava-evaluate-") as folder:
        entries = shapes.write(Path(folder) / "shapes", options.scenes)
        entries = [one for one in entries if one.get("name", one["benchmark"]) in options.only]
        if "throughput" in options.what:
            report["throughput"] = throughput(model, entries, Path(folder), options)
        if "blank" in options.what:
            report["blank"] = right_against_blank(model, entries, workspace)
    if options.json:
        print(json.dumps(report))


def throughput(
    model: Artifact, entries: list[dict[str, Any]], folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Questions per second of both sides over the rounds, and whether they gave the same answers."""
    asks = []
    for entry in entries:
        settings = ExamSettings(**entry | {"max_new_tokens": options.max_new_tokens})
        exam = exams.open_exam(settings, folder / settings.title)
        asks += [
            Ask(f"{settings.title}/{place:07d}", item.prompt, settings.answer_length, item.picture)
            for place, item in enumerate(exam.items)
        ]
    asks = asks[:: max(1, len(asks) // options.questions)][: options.questions]
    sides: dict[str, Callable[[], dict[str, str]]] = {
        "batched": _batched(model, asks, options.batch_size),
        "one by one": _one_by_one(model, asks),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    answers = {}
    for number in range(options.rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            started = _clock()
            answers[name] = sides[name]()
            if number:  # the first round warms up
                seconds[name].append(_clock() - started)
    ours, theirs = answers.values()
    per_second = {name: len(asks) / statistics.median(taken) for name, taken in seconds.items()}
    found = {
        "questions": len(asks),
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "per_second": per_second,
        "times": per_second["batched"] / per_second["one by one"],
        "target": TARGET,
        "equal_answers": sum(ours[key] == theirs[key] for key in ours),
        "distinct_answers": len(set(ours.values())),
    }
    if not options.json:
        print(f"{len(asks)} questions, median of {options.rounds} rounds")
        for name, rate in per_second.items():
            print(f"{name:12} {rate:8.1f} questions/s")
        print(
            f"{found['times']:.2f} times (target {TARGET:g}); {found['equal_answers']} of {len(asks)} answers are "
            f"equal, {found['distinct_answers']} distinct"
        )
    return found


def right_against_blank(model: Artifact, entries: list[dict[str, Any]], workspace: Any) -> dict[str, Any]:
    """Every score with the pictures and with blank ones."""
    questions = find_artifact(model.manifest.inputs["dataset"], [open_store(model.uri.rsplit("/", 2)[0])])
    if questions is None:
        sys.exit(f"{model.uri}: its dataset is gone; give a finetune artifact in its root")
    with connection.disconnecting():
        settings = EvaluateSettings(benchmarks=tuple(ExamSettings(**entry) for entry in entries), workers=2)
        inputs = {"model": model, "questions": questions}
        artifact = run_component(Evaluate(), settings, inputs, workspace).artifact
    print((artifact.folder.read("report.md").decode().split("![scores]")[0]).split("questions):")[1])
    notes, metrics = artifact.manifest.notes["exams"], artifact.manifest.metrics
    return {
        name: {
            "n": note["n"],
            "failed": note["failed"],
            "scores": {
                score: [value, metrics.get(f"eval/{name}/blank_image/{score}")]
                for score, value in note["scores"].items()
            },
        }
        for name, note in notes.items()
    }


def _batched(model: Artifact, asks: list[Ask], size: int) -> Callable[[], dict[str, str]]:
    worker = Answerer(model, gpu=torch.cuda.is_available())

    def run() -> dict[str, str]:
        return {
            one["key"]: one["answers"][RIGHT] for batch in batches(asks, size) for one in worker.answer(batch)
        }

    return run


def _one_by_one(model: Artifact, asks: list[Ask]) -> Callable[[], dict[str, str]]:
    """Stock transformers, as the reference's scripts use it."""
    folder = open_model(model.uri)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stock = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32 if device == "cpu" else "auto"
    )
    stock = stock.to(device).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")

    def one(ask: Ask) -> str:
        content = [{"type": "text", "text": ask.prompt}]
        picture: Image.Image | None = None
        if ask.picture is not None:
            picture = ask.picture.open()
            content.insert(0, {"type": "image"})
        turn = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
        inputs = processor(images=picture, text=prompt, return_tensors="pt").to(device, stock.dtype)
        with torch.inference_mode():
            ids = stock.generate(**inputs, max_new_tokens=ask.max_new_tokens, do_sample=False)
        return processor.tokenizer.decode(
            ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        ).strip()

    return lambda: {ask.key: one(ask) for ask in asks}


def _clock() -> float:
    """Seconds: of this process on a CPU (the machine may be shared), on the wall with a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def parsed() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a finetune artifact, or models:/NAME@ALIAS")
    parser.add_argument("--root", default="runs", help="the root that it lies in")
    parser.add_argument("--what", nargs="+", choices=["throughput", "blank"], default=["throughput", "blank"])
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes in every benchmark")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="benchmarks that are asked")
    parser.add_argument("--questions", type=int, default=256, help="of the throughput's rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
