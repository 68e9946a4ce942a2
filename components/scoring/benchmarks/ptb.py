"""The tokens of a caption as Penn Treebank style cuts them: what COCO's caption scores are counted in.

COCO's own tool starts Java for this. Here stand the rules that captions need: clitics come off ("isn't" is "is n't"),
hyphenated words stay whole, abbreviations keep their full stop, brackets get names, and marks of punctuation are
dropped. `tests/components/scoring/benchmarks/test_captions.py` holds it against the original.
"""

from __future__ import annotations

import re

_DROPPED = re.compile(r"''?|``?|\"|[.?!,:;]|-+|\.\.\.+")

_NAMED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PLAIN = str.maketrans(
    {"’": "'", "‘": "`", "“": '"', "”": '"', "–": "--", "—": "--", "…": " ... ", "½": " 1/2", "¼": " 1/4",
     "¾": " 3/4", "€": "$", "£": "#", "\xa0": " ", "¢": " cents "}
)  # fmt: skip

_ABBREVIATIONS = (
    "mr mrs ms dr st ave blvd rd vs etc co corp inc ltd bros jr sr gen gov sen rep prof rev capt lt "
    "col sgt maj jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu thurs fri calif va "
    "fla mt ft sq dept est tel ext univ assn messrs adm hon pres ph.d cf al ct conn ga ind kan ky md "
    "mich minn mo neb nev okla penn tenn vt wis wyo ariz colo bldg ste intl mfg msgr supt treas cmdr "
    "cpl pfc pvt ens det insp"
)
_CAPITAL_ABBREVIATIONS = "Mass Pa Tex Ill Del La Miss Ore Wash Ark"
_SPLIT_WORDS = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me",
    "gimme": "gim me", "'tis": "'t is", "'twas": "'t was",
}  # fmt: skip


def _any(words: str) -> str:
    return "|".join(re.escape(word) for word in sorted(words.split(), key=len, reverse=True))


_WORD = r"[^\W_](?:[^\W]|[-_/.!?](?=[^\W_]))*"
_TOKEN = re.compile(
    rf"""
      (?:https?://|www\.)\S+ | [\w.+-]{{1,64}}+@[\w-]+(?:\.[\w-]+)+
    | </?[A-Za-z][^<>\s]*>
    | [\#@][A-Za-z_]\w*
    | (?<!\w)(?:(?i:{_any(_ABBREVIATIONS)})|{_any(_CAPITAL_ABBREVIATIONS)})\.(?!\w)
    | (?<![\w.])(?i:no)\.(?=\s?\d)
    | (?<!\w)(?:[^\W\d_]\.)+(?:[^\W\d_](?!\w)|(?!\w))
    | (?i:'tis|'twas)(?!\w) | 'n'(?!\w) | (?<!\w)'\d\ds(?!\w)
    | (?i:n't|'(?:s|re|ve|ll|d|m))(?!\w)
    | \d[\d.,:]{{0,63}}+(?:pm|am|m)(?!\w)
    | (?<![\w.,])[-+]?(?:\d+(?:[.,:/]\d+)*|\.\d+)(?![^\W_]|-\w|/\w)
    | (?i:o'clock|ma'am|[odl]'(?=[^\W\d_]{{2}})[^\W_]+)(?!\w)
    | (?i:y')(?=all) | [A-Z]+&[A-Z]+(?!\w) | \d+-\d+(?!\w)
    | {_WORD}(?:\+\+(?!\w)|\#(?!\w))?
    | ''|``|\.\.\.+|\?[!?]+|![!?]+|--+
    | \S
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(?i)(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?![^\W\d_])")
_UNIT = re.compile(r"^(\d[\d.,:]*)(pm|am|m)$")


def tokens(caption: str) -> list[str]:
    """The lower-case tokens that count, in their order."""
    text = _CLITIC.sub(r" \1 ", caption.translate(_PLAIN))
    cut = " ".join(_spelled(found.group().lower()) for found in _TOKEN.finditer(text))
    return [token for token in cut.split() if not _DROPPED.fullmatch(token)]


def _spelled(token: str) -> str:
    token = _SPLIT_WORDS.get(token, _NAMED.get(token, token))
    return _UNIT.sub(r"\1 \2", token)
