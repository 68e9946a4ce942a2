"""Captions against several people's: BLEU-4, ROUGE-L and CIDEr, counted by pycocoevalcap's own scorers.

Only the tokenizer is ours (`ptb.py`), so that no Java is needed. All three are on its scale: BLEU-4 and ROUGE-L go
from 0 to 1.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from components.scoring.base import (
    Files,
    Record,
    Scored,
    Unit,
    by_id,
    get,
    read_json,
    read_rows,
    same_rows,
    text_of,
)
from components.scoring.benchmarks.benchmark import Benchmark
from components.scoring.benchmarks.ptb import tokens
from components.scoring.benchmarks.reading import Item, Paper, dataset
from components.scoring.bootstrap import Floats
from components.scoring.pictures import Picture
from components.scoring.questions import captioned
from llava.errors import RefusedInput
from llava.text_tokenizer import IMAGE

_N = 4
_TINY, _SMALL = 1e-15, 1e-9
"""What the BLEU scorer adds so that no sum is zero."""


def score(files: Files) -> Scored:
    """`bleu4`, `rouge_l` and `cider` of COCO results against COCO annotations, on the scale of the original."""
    path = files.need("answers", "COCO caption results: a list of {image_id, caption}")
    labels = files.truth("the COCO annotations JSON")
    rows, references = read_rows(path), read_references(labels)
    names = [_image(row, path) for row in rows]
    wanted = [name for name in references if name in set(names)] if files.partial else list(references)
    same_rows(
        wanted,
        names,
        f"{path} ({files.called('partial')} scores what is there)",
        "caption",
        "annotated images",
    )
    given = {name: text_of(row, path, "caption" if "caption" in row else "text")
             for name, row in zip(names, rows, strict=True)}  # fmt: skip
    remarks = []
    if len(wanted) < len(references):
        remarks.append(f"{len(references) - len(wanted):,} of {len(references):,} annotated images have no caption "
                       f"and are left out ({files.called('partial')})")  # fmt: skip
    failed = sum(not given[name].strip() for name in wanted)
    if failed:
        remarks.append(f"{failed:,} captions are empty")
    sums = statistics({name: given[name] for name in wanted}, {name: references[name] for name in wanted})
    units = [
        Unit(
            (name, *sorted(references[name])),
            "",
            " / ".join(references[name]),
            given[name],
            float(row[-1]),
            name,
            int(not given[name].strip()),
        )
        for name, row in zip(wanted, sums, strict=True)
    ]
    return Scored("captions", units, sums, formula, len(units), remarks)


def statistics(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Floats:
    """Per image: 1, its length, the closest reference's, n-grams that match and that there are, ROUGE-L, CIDEr.

    Shape (images, 13), in the order of `captions`. How rare an n-gram is for CIDEr is counted on these references.
    """
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ModuleNotFoundError as error:
        raise RefusedInput(
            f"captions are scored by pycocoevalcap, which is not installed ({error.name}): pip install pycocoevalcap"
        ) from None
    result = {name: [" ".join(tokens(caption))] for name, caption in captions.items()}
    truth = {name: [" ".join(tokens(one)) for one in references[name]] for name in captions}
    bleu = BleuScorer(n=_N)
    for name in captions:
        bleu += (result[name][0], truth[name])
    rouge = Rouge().compute_score(truth, result)[1]
    cider = Cider().compute_score(truth, result)[1]
    counted = [
        [1, parts["testlen"], _closest(parts), *parts["correct"], *parts["guess"]] for parts in bleu.ctest
    ]
    return np.column_stack([np.array(counted, dtype=np.float64), rouge, cider])


def formula(sums: Floats) -> dict[str, Floats]:
    """BLEU-4 of the whole set; the means of ROUGE-L and CIDEr."""
    images, length, reference = sums[..., 0], sums[..., 1], sums[..., 2]
    precisions = (sums[..., 3 : 3 + _N] + _TINY) / (sums[..., 3 + _N : 3 + 2 * _N] + _SMALL)
    ratio = (length + _TINY) / (reference + _SMALL)
    short = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    return {
        "bleu4": np.prod(precisions, axis=-1) ** (1 / _N) * short,
        "rouge_l": sums[..., -2] / images,
        "cider": sums[..., -1] / images,
    }


def read_references(path: Path) -> dict[str, list[str]]:
    """People's captions by image id, from COCO annotations or a LLaVA-format JSON (one reference each)."""
    value: Any = read_json(path) if path.suffix == ".json" else read_rows(path)
    references: dict[str, list[str]] = defaultdict(list)
    if isinstance(value, list):
        for sample in value:
            turns = get(sample, "conversations", path)
            answers = [get(turn, "value", path) for turn in turns if get(turn, "from", path) == "gpt"]
            if len(answers) != 1:
                raise RefusedInput(
                    f"{path}: sample {sample.get('id')} has {len(answers)} answers, not one caption"
                )
            references[str(get(sample, "id", path))].append(str(answers[0]))
        same_rows(references, [str(sample["id"]) for sample in value], str(path), "caption", "samples")
        return references
    seen = [row.get("id") for row in get(value, "annotations", path) if row.get("id") is not None]
    same_rows(seen, seen, f"{path}: annotation ids", "rows", "captions")
    for row in value["annotations"]:
        references[str(get(row, "image_id", path))].append(text_of(row, path, "caption"))
    images = by_id(value.get("images", []), path, key="id")
    without = [id_ for id_ in images if id_ not in references]
    if without:
        raise RefusedInput(
            f"{path}: {len(without):,} images have no reference caption ({', '.join(without[:5])})"
        )
    return references


def prompt(row: Record) -> str:
    """The wish for one sentence, whatever the picture."""
    return "Describe this picture in one short sentence."


def _image(row: Record, path: Path) -> str:
    return str(row["image_id"] if "image_id" in row else get(row, "question_id", path))


def _closest(parts: Record) -> int:
    """The reference length closest to the caption's, the shorter of two."""
    return int(min((abs(length - parts["testlen"]), length) for length in parts["reflen"])[1])


def gather(paper: Paper) -> tuple[list[Item], Files]:
    """A dataset's pictures with captions, COCO's annotations, or a LLaVA-format file."""
    settings, wish = paper.settings, paper.settings.instruction
    if settings.data is not None and (artifact := dataset(settings.data)) is not None:
        return _of_dataset(paper, settings.data, captioned(artifact))
    source = settings.data or str(settings.labels)
    labels = paper.copy(settings.data, "labels") if settings.data else paper.copies["labels"]
    pictures, asked, references = paper.pictures(source), dict[str, str](), read_references(labels)
    if isinstance(value := read_json(labels) if labels.suffix == ".json" else read_rows(labels), list):
        names = {str(sample["id"]): sample.get("image") for sample in value}
        first = {str(sample["id"]): get(sample["conversations"][0], "value", labels) for sample in value}
        asked = {id_: str(text).replace(IMAGE, "").strip() for id_, text in first.items()}
        ids: dict[str, Any] = {str(sample["id"]): sample["id"] for sample in value}
    else:
        names = {str(image["id"]): image.get("file_name") for image in value.get("images", [])}
        ids = {str(row["image_id"]): row["image_id"] for row in value.get("annotations", [])}
    items = [
        Item(wish or asked.get(id_) or prompt({}), pictures(names.get(id_)), {"image_id": ids[id_]}, id_)
        for id_ in references
    ]
    return items, paper.files(labels={"": labels})


def write(items: Sequence[Item], rows: Sequence[Record]) -> tuple[str, str]:
    """COCO's results: a JSON list of image_id, caption."""
    lines = [
        json.dumps(item.row | {"caption": row["text"]}, ensure_ascii=False)
        for item, row in zip(items, rows, strict=True)
    ]
    return ".json", "[" + ",\n".join(lines) + "]\n"


def _of_dataset(paper: Paper, uri: str, rows: Sequence[Record]) -> tuple[list[Item], Files]:
    labels = paper.file("labels.json", uri)
    labels.write_text(json.dumps({
        "images": [{"id": row["id"]} for row in rows],
        "annotations": [{"image_id": row["id"], "caption": text} for row in rows for text in row["captions"]],
    }, ensure_ascii=False), encoding="utf-8")  # fmt: skip
    wish = paper.settings.instruction or prompt({})
    items = [
        Item(wish, Picture.of(row["image"]["bytes"]), {"image_id": row["id"]}, row["id"]) for row in rows
    ]
    return items, paper.files(labels={"": labels})


BENCHMARK = Benchmark(
    name="captions",
    reads={
        "answers": "COCO results JSON",
        "labels": "COCO annotations JSON",
        "questions": "the same",
        "partial": "leave out what has no caption",
    },
    score=score,
    prompt=prompt,
    headline="cider",
    unit="",
    digits=3,
    times=100.0,
    gather=gather,
    needs=[["data"], ["labels"]],
    answer_length=64,
    write=write,
)
