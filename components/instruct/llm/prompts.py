"""Prompts: a folder per type with the system text and worked examples as files; a user may bring a folder of their own.

    VERSION                              one line, told in the report
    conversation/system.txt              what the teacher is asked to do
    conversation/example-1-context.txt   a context ...
    conversation/example-1-answer.txt    ... and what was to be written about it; 2 pairs here, 3 for the others
    detail/requests.txt                  optional: ways to ask for a detailed description, one a line

The contents, not the place, enter the artifact's digest. Nothing is ever filled into these texts: a context is a
message of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from components.contract import open_store, sha256_of
from components.instruct.llm.parse import Unusable, parse
from components.rule_teacher.words import DETAIL_REQUESTS
from llava.errors import RefusedInput

TYPES = ("conversation", "detail", "reasoning")
OWN = Path(__file__).with_name("prompts")
_FILE = re.compile(
    r"VERSION|(?:conversation|detail|reasoning)/(?:system|requests|example-\d+-(?:context|answer))\.txt"
)

Message = dict[str, str]


@dataclass(frozen=True)
class Prompts:
    """The texts of one folder, by their names in it."""

    files: dict[str, str]

    @property
    def digest(self) -> str:
        """Hex sha256 of all texts with their names."""
        return sha256_of(self.files)

    @property
    def version(self) -> str:
        """What the folder calls itself."""
        return self.files.get("VERSION", "unnamed").strip()

    @property
    def requests(self) -> tuple[str, ...]:
        """Ways to ask for a detailed description."""
        own = tuple(
            line.strip() for line in self.files.get("detail/requests.txt", "").splitlines() if line.strip()
        )
        return own or DETAIL_REQUESTS

    def opening(self, kind: str) -> list[Message]:
        """The messages of a type that stand before the context: the system text and the examples."""
        messages = [{"role": "system", "content": self.files[f"{kind}/system.txt"]}]
        for context, answer in self.examples(kind):
            messages += [{"role": "user", "content": context}, {"role": "assistant", "content": answer}]
        return messages

    def examples(self, kind: str) -> list[tuple[str, str]]:
        """(context, answer) pairs in the order of their numbers."""
        names = [
            name
            for name in self.files
            if name.startswith(f"{kind}/example-") and name.endswith("-context.txt")
        ]
        names.sort(key=lambda name: int(name.split("-")[1]))
        answers = [name.replace("-context.txt", "-answer.txt") for name in names]
        return [
            (self.files[name].strip(), self.files[answer].strip())
            for name, answer in zip(names, answers, strict=True)
        ]


def load_prompts(folder: str | None) -> Prompts:
    """The prompts in `folder` (a path or `s3://...`), or our own; RefusedInput where one cannot be used."""
    store = open_store(folder or OWN)
    keys = sorted(entry.key for entry in store.list() if _FILE.fullmatch(entry.key))
    prompts = Prompts({key: store.read(key).decode("utf-8").strip() + "\n" for key in keys})
    for kind in TYPES:
        if f"{kind}/system.txt" not in prompts.files:
            raise RefusedInput(f"instruct.prompts={store.uri}: {kind}/system.txt is missing there")
        try:
            answers = [answer for _, answer in prompts.examples(kind)]
        except KeyError as missing:
            raise RefusedInput(f"instruct.prompts={store.uri}: {missing.args[0]} is missing there") from None
        for number, answer in enumerate(answers, 1):
            try:
                parse(kind, answer, "stop")
            except Unusable as fault:
                raise RefusedInput(
                    f"instruct.prompts={store.uri}: answer {number} of {kind} could not be used if a teacher gave it "
                    f"({fault}), and it would learn to"
                ) from None
    return prompts
