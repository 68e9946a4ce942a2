"""Rows of the dataset from judged responses: the same columns as the rules teacher's, one sample a row."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

from components.datasets.reading import rows_of
from components.datasets.tasks import ShardOutput
from components.instruct.llm.contexts import facts
from components.instruct.llm.filtering import AnswerFilter, sample_id
from components.instruct.llm.responses import Response, responses_of
from components.instruct.samples import cells, measure, picture_after
from components.rule_teacher.rules import Turn
from llava.data.schema import Row

Remains = Mapping[str, Sequence[int]]


def write_shard(output: ShardOutput, arguments: tuple[AnswerFilter, str, int, Remains]) -> None:
    """Write the samples about a shard's photos. `Remains`: the pairs of a sample that other samples leave room for."""
    answer_filter, key, number, remains = arguments
    answered = responses_of(answer_filter.folder, number)
    for row in rows_of(answer_filter.dataset, key):
        written = 0
        for sample in _samples(row, answer_filter, number, answered, remains):
            output.write("train", sample)
            measure(output, "train", sample)
            written += 1
        if not row["conversations"] and not facts(row).captions:
            output.refuse(row["id"], "nothing-to-say", "no caption")
        output.count(f"samples of a photo/{written}")


def _samples(
    row: Row, answer_filter: AnswerFilter, number: int, answered: Mapping[str, Response], remains: Remains
) -> Iterator[Row]:
    if row["conversations"]:
        yield row
        return
    settings = answer_filter.settings
    for request, pairs in answer_filter.rows(row, number, answered):
        name = sample_id(request)
        rng = random.Random(f"instruct {settings.seed} {name}")
        request_for_detail = rng.choice(answer_filter.prompts.requests)
        turns = [
            Turn(request.kind, pairs[at].question or request_for_detail, pairs[at].answer)
            for at in remains.get(name, range(len(pairs)))
        ]
        if turns:
            yield row | {
                "id": name,
                "conversations": cells(turns, after=picture_after(settings, rng)),
                "kinds": [turn.kind for turn in turns],
                "type": request.kind,
            }
