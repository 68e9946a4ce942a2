"""`llava instruct --dry-run`: the prompts about three photos, and what asking about all of them would take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from components.contract import Folder
from components.contract.pace import duration
from components.instruct.llm.asking import budget_of
from components.instruct.llm.limits import WINDOW, Tokens
from components.instruct.llm.prompts import Prompts, load_prompts
from components.instruct.llm.requests import BYTES_PER_TOKEN, Requests, text_rows
from components.instruct.llm.stage import RequestPlan, make_plan
from components.instruct.settings import InstructSettings

PHOTOS_SHOWN = 3
TOKENS_PER_SECOND = 50.0
"""Of one answer as it is written: assumed, since only the endpoint could tell."""


def dry_run(settings: InstructSettings, dataset: Folder, shards: Sequence[str]) -> Iterator[str]:
    """Lines to print; nothing is sent."""
    prompts = load_prompts(settings.prompts)
    maker = Requests(settings, prompts)
    rows = (row for shard in shards for row in text_rows(dataset, shard))
    about = ([*maker.of_row(row, 0)] for row in rows)
    for requests in islice(filter(None, about), PHOTOS_SHOWN):
        for request in requests:
            yield f"=== photo {request.photo}, {request.kind}: {request.prompt_tokens:,} tokens of prompt, about"
            for message in request.messages:
                yield f"--- {message['role']}"
                yield message["content"].rstrip()
            yield ""
    yield from _estimate(settings, prompts, make_plan(settings, prompts, dataset, shards))


def _estimate(settings: InstructSettings, prompts: Prompts, plan: RequestPlan) -> Iterator[str]:
    length = {kind: _answer_tokens(prompts, kind) for kind in plan.types}
    tokens = Tokens(
        sum(plan.prompt_tokens.values()), sum(count * length[kind] for kind, count in plan.types.items())
    )
    count = len(plan.requests)
    types = ", ".join(f"{number:,} {kind}" for kind, number in plan.types.items())
    yield f"requests  {count:,} about {plan.photos:,} photos ({types})"
    yield (
        f"tokens    {tokens.prompt:,} of prompts, {tokens.completion:,} of answers (about; answers as long as the "
        f"examples, at most {count * settings.max_tokens:,})"
    )
    seconds = {
        f"{settings.concurrency} at once, answers of {TOKENS_PER_SECOND:g} tokens a second": tokens.completion
        / TOKENS_PER_SECOND
        / settings.concurrency
    }
    if settings.requests_per_minute:
        seconds[f"{settings.requests_per_minute:,} requests a minute"] = (
            count * WINDOW / settings.requests_per_minute
        )
    if settings.tokens_per_minute:
        seconds[f"{settings.tokens_per_minute:,} tokens a minute"] = (
            tokens.all * WINDOW / settings.tokens_per_minute
        )
    slowest = max(seconds, key=lambda reason: seconds[reason])
    yield f"time      about {duration(seconds[slowest])} ({slowest})"
    if settings.price_prompt or settings.price_completion:
        worst = Tokens(tokens.prompt, count * settings.max_tokens)
        budget = budget_of(settings)
        yield f"cost      about {budget.cost(tokens):,.2f}, at most {budget.cost(worst):,.2f}"
    else:
        yield "cost      unknown: set instruct.price_prompt and instruct.price_completion (of a million tokens)"


def _answer_tokens(prompts: Prompts, kind: str) -> int:
    """Tokens of an answer as long as the examples' on average; without examples a quarter of a page."""
    lengths = [len(answer.encode()) for _, answer in prompts.examples(kind)] or [800]
    return round(sum(lengths) / len(lengths) / BYTES_PER_TOKEN)
