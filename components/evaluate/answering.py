"""Asking: each question three times (right, blank, wrong picture), in chunks, by Ray actors that hold the model.

A finished chunk lies in the artifact's folder until commit; after a crash it is found there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from components.contract import Artifact, Folder
from components.evaluate.questions import Question
from components.evaluate.scores import CONDITIONS, Answered, is_match
from llava.data.images import BadImage, decode
from llava.errors import LlavaError

SAY_EVERY_SECONDS = 5.0
CHUNK = 64
"""Questions per part. Fixed, so that a part means the same whatever the batch size and the workers."""

PARTS = "checkpoints/answers/"
"""Under `checkpoints/`, which goes when the artifact commits: `answers.jsonl` holds them all then."""


@dataclass(frozen=True)
class Asked:
    """A question and the wrong picture that goes with it."""

    question: Question
    wrong: Question


class Answerer:
    """The model in one process; answers chunk after chunk."""

    def __init__(self, model: Artifact, max_new_tokens: int, batch_size: int) -> None:
        import torch

        from llava.generate import load, template_name

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.processor = load(model.local("model"), device)
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.measures_loss = template_name(self.processor) is not None

    def answer(self, number: int, chunk: Sequence[Asked]) -> tuple[int, list[Answered]]:
        """`number` and one line per question of `chunk`, in its order."""
        rows: list[Answered] = []
        for start in range(0, len(chunk), self.batch_size):
            rows += self._batch(chunk[start : start + self.batch_size])
        return number, rows

    def _batch(self, batch: Sequence[Asked]) -> list[Answered]:
        from llava.generate import answer, answer_loss

        texts = [asked.question.question for asked in batch]
        right = [_picture(asked.question) for asked in batch]
        shown = {
            "right_image": right,
            "blank_image": [blank(self.processor.image_processor, picture.size) for picture in right],
            "wrong_image": [_picture(asked.wrong) for asked in batch],
        }
        given = {
            condition: answer(self.model, self.processor, texts, shown[condition], self.max_new_tokens)
            for condition in CONDITIONS
        }
        losses: Sequence[float | None] = [None] * len(batch)
        tokens: Sequence[int | None] = [None] * len(batch)
        if self.measures_loss:
            expected = [asked.question.expected for asked in batch]
            losses, tokens = answer_loss(self.model, self.processor, texts, expected, right)
        return [
            Answered(
                id=asked.question.id,
                kind=asked.question.kind,
                question=asked.question.question,
                expected=asked.question.expected,
                wrong_image_of=asked.wrong.id,
                answers={condition: given[condition][index] for condition in CONDITIONS},
                correct={
                    condition: is_match(given[condition][index], asked.question.expected)
                    for condition in CONDITIONS
                },
                loss=losses[index],
                tokens=tokens[index],
            )
            for index, asked in enumerate(batch)
        ]


def answer_all(
    model: Artifact,
    asked: Sequence[Asked],
    folder: Folder,
    *,
    max_new_tokens: int,
    batch_size: int,
    workers: int,
    before_write: Callable[[], None],
    say: Callable[[str], None],
) -> list[Answered]:
    """Every question's line, in the order of `asked`; parts that lie in `folder` are not asked again.

    `before_write` is called before a part is written (it may raise: the lease is lost).
    """
    starts = range(0, len(asked), CHUNK)
    missing = [start for start in starts if folder.stat(_part(start)) is None]
    if len(missing) < len(starts):
        say(f"{len(starts) - len(missing)} of {len(starts)} chunks of answers are there already")
    done, last = len(starts) - len(missing), -SAY_EVERY_SECONDS
    for start, rows in _answers(model, asked, missing, max_new_tokens, batch_size, workers):
        before_write()
        folder.write(_part(start), to_jsonl(rows))
        done += 1
        if time.monotonic() - last >= SAY_EVERY_SECONDS or done == len(starts):
            say(f"{min(done * CHUNK, len(asked)):,} of {len(asked):,} questions answered")
            last = time.monotonic()
    return [row for start in starts for row in from_jsonl(folder.read(_part(start)))]


def blank(image_processor: Any, size: tuple[int, int]) -> Image.Image:
    """A picture of `size` (width, height) in the image processor's mean colour: nothing to see, nothing unusual."""
    red, green, blue = (round(255 * value) for value in image_processor.image_mean)
    return Image.new("RGB", size, (red, green, blue))


def to_jsonl(rows: Sequence[Answered]) -> bytes:
    """One JSON object a line, UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def from_jsonl(data: bytes) -> list[Answered]:
    """What `to_jsonl` wrote. (A text may hold characters at which `splitlines` would cut.)"""
    return [json.loads(line) for line in data.decode().split("\n") if line]


def _answers(
    model: Artifact,
    asked: Sequence[Asked],
    missing: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    workers: int,
) -> Iterator[tuple[int, list[Answered]]]:
    """(first question, lines) of each chunk in `missing`, as they come."""
    if not missing:
        return
    import ray
    from ray.exceptions import RayActorError, RayTaskError
    from ray.util import ActorPool

    gpus = 1 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0
    remote = ray.remote(Answerer).options(num_cpus=1, num_gpus=gpus, max_restarts=2, max_task_retries=2)
    actors = [remote.remote(model, max_new_tokens, batch_size) for _ in range(min(workers, len(missing)))]
    pool = ActorPool(actors)
    try:
        yield from pool.map_unordered(
            lambda actor, start: actor.answer.remote(start, asked[start : start + CHUNK]),
            missing,
        )
    except RayTaskError as error:
        if isinstance(error.cause, LlavaError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise LlavaError(
            f"a worker that answers questions died ({str(error).splitlines()[0]}); answered chunks are kept: "
            "run again, with fewer workers or a smaller batch_size if memory ran out"
        ) from error
    finally:
        for actor in actors:
            ray.kill(actor)


def _part(start: int) -> str:
    return f"{PARTS}{start:07d}.jsonl"


def _picture(question: Question) -> Image.Image:
    try:
        return decode(question.image)
    except BadImage as error:
        raise LlavaError(f"held-out question {question.id}: {error}") from error
