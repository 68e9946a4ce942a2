"""Asking: batches of questions, each under its conditions, answered by Ray actors that hold the model.

A finished batch lies in the artifact's folder until commit, each answer under its question's key; after a crash only
the questions without an answer are asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from components.contract import Artifact, Folder
from components.contract.pace import SAY_EVERY_SECONDS, Due
from components.ray_cluster.connection import failures_told, resources
from components.scoring.pictures import Picture, blank
from llava.data.jsonl import from_jsonl, to_jsonl

RIGHT, BLANK, WRONG = "right_image", "blank_image", "wrong_image"
PARTS = "checkpoints/answers/"
"""Under `checkpoints/`, which goes when the artifact commits: its answers files hold them all then."""


@dataclass(frozen=True)
class Ask:
    """One question and what is shown with it."""

    key: str
    """Names it among all that are asked: EXAM/NUMBER."""
    prompt: str
    max_new_tokens: int
    picture: Picture | None
    blank: bool = False
    """Whether to ask again with a blank picture."""
    wrong: Picture | None = None
    """Another picture to ask again with."""
    expected: str | None = None
    """An answer whose loss is measured."""


class Answer(TypedDict):
    """What the model said."""

    key: str
    answers: dict[str, str]
    """By condition."""
    loss: float | None
    """Negative log-likelihood of the expected answer with the right picture, nats, summed over its tokens."""
    tokens: int | None


class Answerer:
    """The model in one process; answers batch after batch."""

    def __init__(self, model: Artifact, gpu: bool) -> None:
        from llava.generate import load, template_name

        self.model, self.processor = load(model.local("model"), "cuda" if gpu else "cpu")
        self.measures_loss = template_name(self.processor) is not None

    def ready(self) -> None:
        """Answered as soon as the model is loaded."""

    def answer(self, batch: Sequence[Ask]) -> list[Answer]:
        """One answer per question, in their order; all of a batch are asked under the same conditions."""
        from llava.generate import answer, answer_loss

        texts = [ask.prompt for ask in batch]
        right = [None if ask.picture is None else ask.picture.open() for ask in batch]
        shown = {RIGHT: right}
        if batch[0].blank:
            empty = self.processor.image_processor
            shown[BLANK] = [None if seen is None else blank(empty, seen.size) for seen in right]
        if batch[0].wrong is not None:
            shown[WRONG] = [None if ask.wrong is None else ask.wrong.open() for ask in batch]
        given = {
            condition: answer(self.model, self.processor, texts, pictures, batch[0].max_new_tokens)
            for condition, pictures in shown.items()
        }
        losses: Sequence[float | None] = [None] * len(batch)
        tokens: Sequence[int | None] = [None] * len(batch)
        expected = [ask.expected for ask in batch if ask.expected is not None]
        if self.measures_loss and len(expected) == len(batch):
            losses, tokens = answer_loss(self.model, self.processor, texts, expected, right)
        return [
            Answer(
                key=ask.key,
                answers={condition: answers[index] for condition, answers in given.items()},
                loss=losses[index],
                tokens=tokens[index],
            )
            for index, ask in enumerate(batch)
        ]


def answer_all(
    model: Artifact,
    asks: Sequence[Ask],
    folder: Folder,
    *,
    batch_size: int,
    workers: int,
    gpu: bool = False,
    before_write: Callable[[], None],
    say: Callable[[str], None],
) -> dict[str, Answer]:
    """The answer to each question by its key; those that lie in `folder` are not asked for again.

    `before_write` is called before a batch is written (it may raise: the lease is lost).
    """
    found = _stored(folder)
    missing = [ask for ask in asks if ask.key not in found]
    if found:
        say(f"{len(asks) - len(missing):,} of {len(asks):,} questions are answered already")
    due = Due()
    for answers in _answers(model, batches(missing, batch_size), workers, gpu, say):
        before_write()
        # No later batch holds the first key of this one: no file is ever written twice.
        folder.write(f"{PARTS}{answers[0]['key']}.jsonl", to_jsonl(answers))
        found |= {answer["key"]: answer for answer in answers}
        if due() or len(found) == len(asks):
            say(f"{len(found):,} of {len(asks):,} questions answered")
    return {ask.key: found[ask.key] for ask in asks}


def batches(asks: Sequence[Ask], size: int) -> list[list[Ask]]:
    """Questions that may be answered together: of one exam, and alike in length, so that little is padding."""
    exams: dict[str, list[Ask]] = {}
    for ask in asks:
        exams.setdefault(ask.key.partition("/")[0], []).append(ask)
    cut = []
    for group in exams.values():
        group.sort(key=lambda ask: (ask.picture is None, len(ask.prompt)))
        cut += [group[start : start + size] for start in range(0, len(group), size)]
    return cut


def _stored(folder: Folder) -> dict[str, Answer]:
    rows = [row for entry in folder.list(PARTS) for row in from_jsonl(folder.read(entry.key))]
    return {row["key"]: row for row in rows}


def _answers(
    model: Artifact, waiting: Sequence[list[Ask]], workers: int, gpu: bool, say: Callable[[str], None]
) -> Iterator[list[Answer]]:
    """The answers of each batch, as they come. Workers that find no place yet hold nobody up."""
    if not waiting:
        return
    import ray

    remote: Any = ray.remote(Answerer).options(
        num_cpus=1, num_gpus=int(gpu), max_restarts=2, max_task_retries=2
    )
    actors = [remote.remote(model, gpu) for _ in range(min(workers, len(waiting)))]
    coming = {actor.ready.remote(): actor for actor in actors}
    left, busy = deque(waiting), dict[Any, Any]()
    what = "GPU" if gpu else "CPU"
    try:
        with failures_told(
            "a worker that answers questions died; fewer workers or a smaller batch_size take less memory"
        ):
            while left or busy:
                done, _ = ray.wait([*coming, *busy], num_returns=1, timeout=SAY_EVERY_SECONDS)
                if not done and not busy:
                    say(f"no worker has the model yet; each asks for 1 {what}, the cluster has {resources()}")
                for reference in done:
                    found = ray.get(reference)
                    actor = coming.pop(reference, None)
                    if actor is None:
                        actor = busy.pop(reference)
                        yield found
                    if left:
                        busy[actor.answer.remote(left.popleft())] = actor
    finally:
        for actor in actors:
            ray.kill(actor)
