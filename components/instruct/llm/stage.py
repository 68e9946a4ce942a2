"""The stage with a language model as the teacher: what is missing is asked for, all is judged, samples are written."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from components.contract import Folder, Job, Workspace
from components.datasets.tasks import ShardTask
from components.instruct.llm.asking import Tally, Work, ask_all, budget_of, told
from components.instruct.llm.contexts import facts
from components.instruct.llm.endpoint import probe
from components.instruct.llm.filtering import (
    AnswerFilter,
    FilterVerdict,
    crowded,
    crowded_out,
    share_rejected,
)
from components.instruct.llm.limits import Tokens
from components.instruct.llm.prompts import Prompts, load_prompts
from components.instruct.llm.report import report_teacher
from components.instruct.llm.requests import Requests, text_rows
from components.instruct.llm.responses import adopt, any_stored, stored
from components.instruct.llm.writing import write_shard
from components.instruct.settings import InstructSettings
from llava.data.jsonl import to_jsonl
from llava.errors import BudgetReached, LlavaError, RefusedInput

REJECTED_FILE = "rejected.jsonl"


@dataclass
class RequestPlan:
    """Everything that will be asked about a dataset. `requests`: digest -> shard; tokens are estimates by length."""

    requests: dict[bytes, int] = field(default_factory=dict)
    types: Counter[str] = field(default_factory=Counter)
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    most: Tokens = Tokens()  # noqa: RUF009 - a NamedTuple never changes
    """Of the largest request."""
    categories: tuple[str, ...] = ()
    photos: int = 0


def try_endpoint(settings: InstructSettings, workspace: Workspace) -> None:
    """RefusedInput where the teacher cannot be asked. Not tried where the root has answers: they may be all of them."""
    if settings.teacher == "llm" and not any_stored(workspace.store.sub("instruct")):
        probe(settings)


def make_plan(
    settings: InstructSettings, prompts: Prompts, dataset: Folder, shards: Sequence[str]
) -> RequestPlan:
    """Read captions and boxes of all photos once; nothing is asked."""
    plan, maker, categories = RequestPlan(), Requests(settings, prompts), set()
    for shard, key in enumerate(shards):
        for row in text_rows(dataset, key):
            plan.photos += 1
            known = facts(row)
            categories |= set(known.boxes or {})
            for request in maker.of_row(row, shard, known):
                plan.requests[bytes.fromhex(request.digest)] = shard
                plan.types[request.kind] += 1
                plan.prompt_tokens[request.kind] += request.prompt_tokens
                plan.most = max(
                    plan.most, Tokens(request.most_prompt_tokens, settings.max_tokens), key=lambda t: t.all
                )
    plan.categories = tuple(sorted(categories))
    return plan


def answered_tasks(
    job: Job[InstructSettings], dataset: Folder, shards: Sequence[str], counts: Sequence[int]
) -> list[ShardTask]:
    """Have everything answered and judged; the tasks that write the training shards.

    Raises RefusedInput for an endpoint that cannot be used, before anything is asked; BudgetReached; LlavaError if more
    than `instruct.max_rejected` of the answers are rejected. What was answered by then is stored.
    """
    settings: InstructSettings = job.settings
    prompts = load_prompts(settings.prompts)
    for name, text in prompts.files.items():
        job.folder.write(f"prompts/{name}", text.encode())
    try_endpoint(settings, job.workspace)
    plan = make_plan(settings, prompts, dataset, shards)
    if settings.tokens_per_minute is not None and plan.most.all > settings.tokens_per_minute:
        raise RefusedInput(
            f"instruct.tokens_per_minute={settings.tokens_per_minute}: one request may take {plan.most.all:,} tokens "
            f"({plan.most.prompt:,} of prompt, instruct.max_tokens={settings.max_tokens} of answer); lower "
            "instruct.max_tokens"
        )
    tally = _ask(job, Work(settings, prompts, dataset, tuple(shards), job.folder, job.lease.guard), plan)
    answer_filter = AnswerFilter(settings, prompts, dataset, job.folder, plan.categories)
    by_shard, verdict = _filter(answer_filter, shards)
    rest = crowded_out(verdict.samples, settings.same_question, settings.seed)
    verdict.rejects += crowded(verdict.samples, rest)
    job.folder.write(REJECTED_FILE, to_jsonl(map(asdict, verdict.rejects)))
    report_teacher(job, prompts, stored(job.folder).tokens, tally, verdict)
    _refuse_if_too_much_was_rejected(verdict, settings.max_rejected)
    tasks = []
    for part, key in enumerate(shards):
        remains = {name: rest[name] for name in by_shard[part].samples if name in rest}
        tasks.append(
            ShardTask(
                f"train-{part:05d}", part, counts[part], write_shard, (answer_filter, key, part, remains)
            )
        )
    return tasks


def _ask(job: Job[InstructSettings], work: Work, plan: RequestPlan) -> Tally:
    settings = work.settings
    found = stored(job.folder)
    missing = {digest: shard for digest, shard in plan.requests.items() if digest not in found.digests}
    types = ", ".join(f"{count:,} {kind}" for kind, count in plan.types.items())
    job.say(f"{len(plan.requests):,} requests about {plan.photos:,} photos ({types}) for {settings.model}")
    if missing:
        others = job.workspace.store.sub("instruct")
        if taken := adopt(others, job.folder, missing, job.lease.check):
            job.say(f"{taken:,} of them are answered in other artifacts of this root")
            found = stored(job.folder)
            missing = {digest: shard for digest, shard in missing.items() if digest not in found.digests}
    if found.digests:
        job.say(
            f"{len(plan.requests) - len(missing):,} answers are stored already, {len(missing):,} are missing"
        )
    tally = Tally()
    if missing:
        probe(settings)
        job.workspace.cluster()
        began = time.monotonic()
        tally = ask_all(job, work, len(missing), found.tokens)
        job.say(
            f"{tally.answered:,} requests answered in {time.monotonic() - began:,.0f} s; all together "
            f"{told(found.tokens + tally.tokens, budget_of(settings))}"
        )
    else:
        job.workspace.cluster()
    if tally.used_up:
        found = stored(job.folder)
        answered = sum(digest in found.digests for digest in plan.requests)
        raise BudgetReached(
            f"the budget is reached: {answered:,} of {len(plan.requests):,} requests are answered and kept "
            f"({told(found.tokens, budget_of(settings))}). Raise instruct.budget_tokens or instruct.budget_money and "
            "run the same command again: it goes on from there"
        )
    return tally


def _filter(answer_filter: AnswerFilter, shards: Sequence[str]) -> tuple[list[FilterVerdict], FilterVerdict]:
    """The verdict on each shard, and all together."""
    import ray

    remote = ray.remote(num_cpus=1, max_retries=3)(_filter_shard)
    by_shard = ray.get([remote.remote(answer_filter, key, number) for number, key in enumerate(shards)])
    together = FilterVerdict()
    for part in by_shard:
        together.add(part)
    return by_shard, together


def _filter_shard(answer_filter: AnswerFilter, key: str, number: int) -> FilterVerdict:
    return answer_filter.shard(key, number)


def _refuse_if_too_much_was_rejected(verdict: FilterVerdict, most: float) -> None:
    if share_rejected(verdict) <= most:
        return
    whole = [one for one in verdict.rejects if one.pair is None]
    examples = {one.reason: one for one in reversed(whole)}
    reasons = "; ".join(
        f"{count:,} x {reason} (such as {examples[reason].id}: {' '.join(examples[reason].text.split())[:80]!r})"
        for reason, count in Counter(one.reason for one in whole).most_common()
    )
    raise LlavaError(
        f"{len(whole):,} of {verdict.judged.total():,} answers are rejected, limit instruct.max_rejected={most:g}: "
        f"{reasons}. {REJECTED_FILE} in the artifact holds them all; the answers are kept: mend the prompts or "
        "the model, or raise instruct.max_rejected"
    )
