"""What a teacher wrote, held against what is known: reasons to reject a pair or a whole sample.

| reason | a pair or sample is rejected if |
|---|---|
| marker | it holds what a template or the data format gives a meaning to (`<image>`, `</s>`, `ASSISTANT:`, `###`) |
| mentions-source | it speaks of captions, boxes, coordinates or the text that it was given |
| gives-away | the question holds every word of the answer that matters |
| contradicts | it counts a category that neither boxes nor captions show, or otherwise than both; a wrong yes or no |
| repeated | the same question was asked before in the same sample |
| too-long | the answer has more than `instruct.max_words` words |
| too-short | a detailed description has fewer than 20 words |
| wrong-language | the sample is not in `instruct.language` |
| unrelated | the answers share words with fewer than two captions and categories (where there are two) |

The first five and `too-long` are about one pair, which goes with the pairs after it that lean on it; the others are
about the sample. Tests of words are for English (`language: en`); in other languages markers, lengths, language and
form remain.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from components.instruct.llm.contexts import Facts
from components.instruct.llm.parse import Pair
from components.rule_teacher.words import NUMBERS, plural

VERSION = "2"
"""Raised whenever the same answer may be judged otherwise; enters the digest of what a language model wrote."""
FEWEST_WORDS = 20  # of a detailed description
COUNTED = 8  # objects of a category up to which boxes are trusted to hold all of them
LETTERS = 60  # under which nobody can tell a language
CERTAIN = 0.9

# A line's own spaces, not the lines between: with `\s*` a page of empty lines takes seconds.
_MARKER = re.compile(
    r"<\s*+/?\s*+(?:image|s|unk|pad|bos|eos)\s*+/?>|^(?>.*?<\|).*?\|>|\[/?\s*INST\s*\]|<</?\s*SYS\s*>>|"
    r"<(?:start|end)_of_turn>|"
    r"^[^\S\n]*(?:USER|ASSISTANT|SYSTEM|User|Assistant|System|Human|human|gpt|GPT)\s*:|^[^\S\n]*#{3}|={3,}|"
    r"^[^\w\n]*(?:Question|Answer)\s*:|\b(?:USER|ASSISTANT)\s*:",
    re.M,
)
_EDGE = r"(?<![\d.])(?:0?\.\d{2,3}|1\.0{2,3})\b"
_SOURCE = re.compile(
    r"\bcaptions?\b|\bbounding[ -]?box(?:es)?\b|\bcoordinates?\b|\bannotat(?:ed|ions?)\b|\blist of objects\b|"
    r"\b(?:provided|given|supplied|listed|above|following) (?:\w+ )?(?:descriptions?|sentences?|information|"
    r"texts?|objects?|lists?|contexts?|records?|data)\b|"
    r"\b(?:according to|based on|from|in) the (?:descriptions?|sentences|texts?|lists?|context|record|data)\b|"
    r"\bthe (?:descriptions?|sentences?|context|record) (?:mentions?|says?|states?|describes?|tells?)\b|"
    # [0.12, ... and "0.123, 0.456", "x1 = 0.123, y1 = 0.456", "0.12 to 0.45": edges as contexts give them
    r"[\[(]\s*[01]?\.\d+\s*[,;]|" + rf"{_EDGE}[\s,;/–-]+(?:[a-z]\w{{0,5}}[\s=:]+)?{_EDGE}",
    re.I,
)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_LEANS = re.compile(
    r"\b(?:it|its|they|them|their|theirs|he|him|his|she|her|hers|this|that|these|those|one|ones|there|so|such|same|else|other|others)\b",
    re.I,
)
_SMALL = frozenset(
    re.findall(
        r"\w+",
        """
        a an the of in on at to by for with from and or but is are was were be been being am do does did doing done has
        have had can could will would may might shall should must there here it its this that these those
        they them their he she his her him you your i we our us what which who whom whose where when why how
        as not no yes if than then so very any some picture image photo photograph scene see seen shown show
        shows visible please tell me
        """,
    )
)
_LANGUAGES = frozenset(
    re.findall(
        r"\w+",
        """
        ar bg cs da de el en es et fa fi fr he hi hr hu id it ja ko lt lv nl no pl pt ro ru sk sl sv ta th
        tr uk vi zh
        """,
    )
)
_AMOUNTS = {word: number for number, word in enumerate(NUMBERS)} | {"no": 0, "zero": 0}
_AMOUNT = rf"(?:{'|'.join(NUMBERS)}|zero|\d{{1,3}})"


@dataclass(frozen=True)
class Fault:
    """Why a pair (its number) or a whole sample (None) is rejected."""

    reason: str
    pair: int | None
    text: str


def faults(
    kind: str, pairs: Sequence[Pair], known: Facts, categories: Iterable[str], language: str, max_words: int
) -> list[Fault]:
    """The first fault of every pair that has one, or the one fault of the whole sample.

    `categories` are all that anybody looked for in the dataset: only what was looked for can be absent.
    """
    english = language == "en"
    found: dict[int, Fault] = {}
    asked: set[tuple[str, ...]] = set()
    shown = _Shown(known, categories) if english else None
    for number, pair in enumerate(pairs):
        reason = _of_pair(pair, max_words, shown, english)
        words = content_words(pair.question)
        if reason is None and words and words in asked:
            reason = "repeated"
        asked.add(words)
        if reason is not None:
            found[number] = Fault(reason, number, " / ".join(pair))
    passed = [pair for number, pair in enumerate(pairs) if number not in found]
    whole = _of_sample(kind, passed, known, language) if passed else None
    if whole is not None:
        return [Fault(whole, None, "\n".join(" / ".join(pair) for pair in pairs))]
    return list(found.values())


def leans(question: str) -> bool:
    """Whether a question may point back at the one before it."""
    return bool(_LEANS.search(question))


def content_words(text: str) -> tuple[str, ...]:
    """The words that matter, without order, endings or repetition: nearly the same question gives the same."""
    words = (word.casefold() for word in _WORD.findall(text))
    return tuple(sorted({_stem(word) for word in words if word not in _SMALL}))


def speaks(language: str, text: str) -> bool:
    """Whether a text is in the language, as far as its length allows to tell."""
    if sum(letter.isalpha() for letter in text) < LETTERS:
        return True
    found, certainty = _identifier(language).classify(text)
    return bool(found == language or certainty < CERTAIN)


def language_is_known(language: str) -> bool:
    """Whether texts in a language can be told from others."""
    try:
        return bool(_identifier(language))
    except ValueError:
        return False


def _of_pair(pair: Pair, max_words: int, shown: _Shown | None, english: bool) -> str | None:
    text = "\n".join(pair)
    if _MARKER.search(text):
        return "marker"
    if english and _SOURCE.search(text):
        return "mentions-source"
    if len(pair.answer.split()) > max_words:
        return "too-long"
    if english and pair.question and _gives_away(pair):
        return "gives-away"
    if shown is not None and shown.contradicts(pair):
        return "contradicts"
    return None


def _of_sample(kind: str, pairs: Sequence[Pair], known: Facts, language: str) -> str | None:
    answers = " ".join(pair.answer for pair in pairs)
    if not speaks(language, " ".join(" ".join(pair) for pair in pairs)):
        return "wrong-language"
    if language != "en":
        return None
    if kind == "detail" and len(answers.split()) < FEWEST_WORDS:
        return "too-short"
    return None if _related(answers, known) else "unrelated"


def _gives_away(pair: Pair) -> bool:
    """A choice ("... or ...") and a question for yes or no hold their answer by right."""
    if re.match(r"\W*(?:yes|no)\b", pair.answer, re.I) or re.search(r"\bor\b", pair.question, re.I):
        return False
    words = set(content_words(pair.answer))
    return bool(words) and words <= set(content_words(pair.question))


def _related(answers: str, known: Facts) -> bool:
    """One source alone does not count: a caption that gives an order would vouch for whoever obeys it."""
    sources = [
        words for text in (*known.captions, *(known.boxes or {})) if (words := set(content_words(text)))
    ]
    said = set(content_words(answers))
    return sum(bool(words & said) for words in sources) >= min(2, len(sources))


class _Shown:
    """Simple tests against boxes and captions; categories count as the same in capitals."""

    def __init__(self, known: Facts, categories: Iterable[str]) -> None:
        self._said = " ".join(known.captions).casefold()
        self._counts: Counter[str] = Counter()
        for name, count in (known.counts or {}).items():
            self._counts[name.casefold()] += count
        self._known = () if known.boxes is None else tuple(sorted({name.casefold() for name in categories}))

    def contradicts(self, pair: Pair) -> bool:
        """Whether the pair says of a category what boxes and captions together exclude."""
        question, answer = (text.casefold() for text in pair)
        if not self._known:
            return False
        names = _names(self._known)
        counted = (found for found in names.counted.finditer(answer) if _number(found["amount"]) > 0)
        return (
            any(self._absent(names.category[found["name"]]) for found in counted)
            or self._wrong_amount(names, question, answer)
            or self._wrong_yes_or_no(names, question, answer)
        )

    def _wrong_amount(self, names: _Names, question: str, answer: str) -> bool:
        asked, told = names.asked_many.search(question), re.search(rf"\b(?:{_AMOUNT}|no)\b", answer)
        if not asked or not told:
            return False
        category, amount = names.category[asked["name"]], _number(told[0])
        if not self._counts[category]:
            return amount > 0 and self._absent(category)
        word = NUMBERS[amount] if amount < len(NUMBERS) else told[0]
        said = re.search(rf"\b(?:{amount}|{word})\b", self._said)
        return not said and amount != self._counts[category] <= COUNTED

    def _wrong_yes_or_no(self, names: _Names, question: str, answer: str) -> bool:
        asked, told = names.asked_any.match(question), re.match(r"\W*(yes|no)\b", answer)
        if not asked or not told:
            return False
        category = names.category[asked["name"]]
        return self._absent(category) if told[1] == "yes" else self._counts[category] > 0

    def _absent(self, category: str) -> bool:
        return not self._counts[category] and not any(
            re.search(rf"\b{re.escape(name)}", self._said)
            for name in {category, plural(category), *category.split()}
        )


class _Names(NamedTuple):
    """Names -> category, singular and plural, in small letters.

    Patterns for `two brown dogs`, `how many dogs`, `is there a dog?`.
    """

    category: dict[str, str]
    counted: re.Pattern[str]
    asked_many: re.Pattern[str]
    asked_any: re.Pattern[str]


@functools.lru_cache(maxsize=4)
def _names(categories: tuple[str, ...]) -> _Names:
    one = {name: name for name in categories}
    many = {plural(name): name for name in categories}

    def any_of(names: Iterable[str]) -> str:
        return f"(?P<name>{'|'.join(re.escape(name) for name in sorted(names, key=len, reverse=True))})"

    return _Names(
        one | many,
        re.compile(rf"\b(?P<amount>{_AMOUNT})(?: (?!of\b|or\b|and\b)\w+)? {any_of(many)}\b"),
        re.compile(rf"\bhow many {any_of(many)}\b"),
        re.compile(
            r"\W*(?:(?:is|are) there|can you see|do you see|does the (?:picture|image|photo) show) "
            r"(?:(?:an?|any|some|the) )?"
            rf"{any_of(one | many)}(?: (?:in|on) the (?:picture|image|photo|photograph|scene))?\s*\?"
        ),
    )


@functools.lru_cache(maxsize=4)
def _identifier(language: str) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(_LANGUAGES | {language})
    return identifier


def _number(word: str) -> int:
    return int(word) if word.isdigit() else _AMOUNTS[word]


def _stem(word: str) -> str:
    for ending in ("'s", "’s", "ies", "ing", "es", "ed", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word
