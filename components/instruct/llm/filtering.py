"""From stored responses to samples: what is rejected and why, and how often the set may ask the same question."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from components.contract import Folder
from components.instruct.llm.checks import content_words, faults, leans
from components.instruct.llm.contexts import Facts, facts, tiny_boxes
from components.instruct.llm.parse import Pair, Unusable, parse
from components.instruct.llm.prompts import Prompts
from components.instruct.llm.requests import Request, Requests, text_rows
from components.instruct.llm.responses import Response, responses_of
from components.instruct.settings import InstructSettings
from llava.data.schema import Row
from llava.errors import LlavaError

NEAR_DUPLICATE = "near-duplicate"


@dataclass(frozen=True)
class Reject:
    """One sample (`pair` None) or one of its pairs that was not taken, kept for reading."""

    id: str
    type: str
    pair: int | None
    reason: str
    text: str


class Asked(NamedTuple):
    """A question of a sample: what makes it the same as another, and whether it leans on the one before."""

    words: bytes
    leans: bool
    question: str


@dataclass
class FilterVerdict:
    """What judging a shard, or several, found.

    `samples`: sample id -> its questions; `words`: type -> words of each answer.
    """

    samples: dict[str, list[Asked]] = field(default_factory=dict)
    words: dict[str, list[int]] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    judged: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, other: FilterVerdict) -> None:
        """Take in another verdict."""
        self.samples |= other.samples
        for kind, words in other.words.items():
            self.words.setdefault(kind, []).extend(words)
        self.rejects += other.rejects
        self.judged.update(other.judged)
        self.notes.update(other.notes)


@dataclass(frozen=True)
class AnswerFilter:
    """Keeps what is right of the responses about one dataset. `categories`: all that anybody looked for in it."""

    settings: InstructSettings
    prompts: Prompts
    dataset: Folder
    folder: Folder
    categories: tuple[str, ...]

    def shard(self, key: str, number: int) -> FilterVerdict:
        """The verdict on everything about the photos of a shard."""
        verdict = FilterVerdict()
        answered = responses_of(self.folder, number)
        maker = Requests(self.settings, self.prompts)
        for row in text_rows(self.dataset, key):
            known = facts(row)
            verdict.notes.update(known.notes)
            verdict.notes["tiny boxes"] += tiny_boxes(known)
            for request, pairs, rejects in self._row(row, number, known, maker, answered):
                verdict.judged[request.kind] += 1
                verdict.rejects += rejects
                if pairs:
                    lengths = [len(pair.answer.split()) for pair in pairs]
                    verdict.words.setdefault(request.kind, []).extend(lengths)
                    # A description is asked for in our words, as often as we like.
                    verdict.samples[sample_id(request)] = [
                        Asked(_words(pair.question), leans(pair.question), pair.question)
                        for pair in pairs
                        if pair.question
                    ]
        return verdict

    def rows(
        self, row: Row, number: int, answered: Mapping[str, Response]
    ) -> Iterator[tuple[Request, list[Pair]]]:
        """The samples about one photo: its requests with the pairs that passed."""
        maker = Requests(self.settings, self.prompts)
        for request, pairs, _ in self._row(row, number, facts(row), maker, answered):
            if pairs:
                yield request, pairs

    def _row(
        self, row: Row, number: int, known: Facts, maker: Requests, answered: Mapping[str, Response]
    ) -> Iterator[tuple[Request, list[Pair], list[Reject]]]:
        for request in maker.of_row(row, number, known):
            if request.digest not in answered:
                raise LlavaError(
                    f"{self.folder.uri}/responses: the response about photo {row['id']} ({request.kind}) is gone; "
                    "run again"
                )
            yield request, *self._response(request, answered[request.digest], known)

    def _response(
        self, request: Request, response: Response, known: Facts
    ) -> tuple[list[Pair], list[Reject]]:
        """(pairs that passed, what did not): nothing but rejects, or pairs and the rejects of others."""
        name, kind = sample_id(request), request.kind
        text = response.body
        try:
            text, finish_reason = _content(response)
            pairs = parse(kind, text, finish_reason)
        except Unusable as fault:
            return [], [Reject(name, kind, None, fault.reason, f"{fault}\n{text}")]
        settings = self.settings
        found = faults(kind, pairs, known, self.categories, settings.language, settings.max_words)
        bad = {fault.pair for fault in found}
        kept = [] if None in bad else [pairs[number] for number in standing(pairs, bad)]
        rejects = [Reject(name, kind, fault.pair, fault.reason, fault.text) for fault in found]
        if not kept and None not in bad:
            rejects.append(Reject(name, kind, None, found[0].reason, text))
        return kept, rejects


def sample_id(request: Request) -> str:
    """`000000000790-detail`."""
    return f"{request.photo}-{request.kind}"


def standing(pairs: Sequence[Pair | Asked], bad: Iterable[int | None]) -> list[int]:
    """The numbers of the pairs that remain without the bad ones and those that lean on one of them."""
    gone, kept, dropped = set(bad), [], False
    for number, pair in enumerate(pairs):
        follows = pair.leans if isinstance(pair, Asked) else leans(pair.question)
        dropped = number in gone or (dropped and follows)
        if not dropped:
            kept.append(number)
    return kept


def crowded(samples: Mapping[str, Sequence[Asked]], rest: Mapping[str, Sequence[int]]) -> list[Reject]:
    """What `crowded_out` took, for reading: pairs, or samples of which nothing remains."""
    rejects = []
    for name, remains in rest.items():
        kind, questions = name.rpartition("-")[2], samples[name]
        if not remains:
            text = "\n".join(asked.question for asked in questions)
            rejects.append(Reject(name, kind, None, NEAR_DUPLICATE, text))
            continue
        lost = set(range(len(questions))) - set(remains)
        rejects += [Reject(name, kind, at, NEAR_DUPLICATE, questions[at].question) for at in sorted(lost)]
    return rejects


def crowded_out(samples: Mapping[str, Sequence[Asked]], most: int, seed: int) -> dict[str, list[int]]:
    """Sample id -> the pairs that remain, for every sample that loses some because `most` others ask the same.

    Which of them stay depends on the seed and the samples' ids, not on the order in which they came.
    """
    uses: dict[bytes, list[tuple[bytes, str, int]]] = defaultdict(list)
    for name, questions in samples.items():
        for number, asked in enumerate(questions):
            uses[asked.words].append((_rank(seed, name, number), name, number))
    bad: dict[str, set[int]] = defaultdict(set)
    for same in uses.values():
        for _, name, number in sorted(same)[most:]:
            bad[name].add(number)
    return {name: standing(samples[name], numbers) for name, numbers in bad.items()}


def share_rejected(verdict: FilterVerdict) -> float:
    """Answers that gave no sample at all, of all answers."""
    answers = verdict.judged.total()
    return sum(one.pair is None for one in verdict.rejects) / answers if answers else 0.0


def _content(response: Response) -> tuple[str, str | None]:
    """What the teacher wrote, and why it stopped."""
    if response.status != 200:
        raise Unusable("refused-by-endpoint", f"status {response.status}")
    choice = json.loads(response.body)["choices"][0]
    message = choice["message"]
    if message.get("refusal"):
        raise Unusable("refusal", str(message["refusal"]))
    content = message.get("content")
    return content if isinstance(content, str) else "", choice.get("finish_reason")


def _words(question: str) -> bytes:
    words = content_words(question) or (question.casefold(),)
    return hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()


def _rank(seed: int, name: str, number: int) -> bytes:
    return hashlib.blake2b(f"{seed} {name} {number}".encode(), digest_size=8).digest()
