"""Caption scores against pycocoevalcap with its own Java tokenizer, on real captions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from components.scoring.benchmarks import captions
from components.scoring.benchmarks.ptb import tokens
from components.scoring.bootstrap import point

pytest.importorskip("pycocoevalcap")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="the original tokenizer needs Java")


@pytest.fixture(scope="module")
def leave_one_out(coco_folder: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Each of the 530 captions as the candidate against the others of its picture."""
    by_image: dict[str, list[str]] = {}
    for row in json.loads((coco_folder / "annotations" / "captions.json").read_text())["annotations"]:
        by_image.setdefault(str(row["image_id"]), []).append(row["caption"])
    given, references = {}, {}
    for image, texts in by_image.items():
        for place, text in enumerate(texts):
            given[f"{image}-{place}"] = text
            references[f"{image}-{place}"] = texts[:place] + texts[place + 1 :]
    return given, references


@needs_java
def test_scores_of_real_captions_are_those_of_the_original(
    leave_one_out: tuple[dict[str, str], dict[str, list[str]]],
) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    given, references = leave_one_out
    java = PTBTokenizer()
    result = java.tokenize({name: [{"caption": text}] for name, text in given.items()})
    truth = java.tokenize({name: [{"caption": text} for text in texts] for name, texts in references.items()})
    original = {
        "bleu4": Bleu(4).compute_score(truth, result, verbose=0)[0][3],
        "rouge_l": Rouge().compute_score(truth, result)[0],
        "cider": Cider().compute_score(truth, result)[0],
    }
    ours = point(captions.statistics(given, references), captions.formula)
    print(len(given), "captions; ours", ours, "original", original)
    assert len(given) >= 300
    assert ours == pytest.approx(original, abs=1e-3)


@needs_java
def test_odd_captions_are_cut_as_the_original_cuts_them() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    odd = [
        "A man's dog isn't here, they're at the dogs' park; it's \"fun\"!",
        "I'm sure he'd've gone... we'll see -- won't we?",
        "Cannot, gonna, wanna, gotta: 'tis o'clock, ma'am.",
        "Mr. Smith of St. Louis, U.S.A., at 3:30 p.m. etc.",
        "A (small) [red] {odd} black/white t-shirt & $5.00, 50% off #1",
        "Two 5-year-old boys, 5'10\" tall, 1,000 people, 1/2 cup, 2x4, .5, 747-400",
        "A cat,dog.The end .  ok ? !! a!b",
        "café naïve — dash – en ‘q’ “dq” … it’s don’t",
        "rock 'n' roll in the '90s and 80's, y'all",
        "AT&T b&w C++ www.foo.com a@b.co <b> no. 5 and no.",
        "- leading, trailing- and mid-air -like _",
    ]
    original = PTBTokenizer().tokenize({str(place): [{"caption": text}] for place, text in enumerate(odd)})
    assert {place: tokens(text) for place, text in enumerate(odd)} == {
        place: original[str(place)][0].split() for place in range(len(odd))
    }


def test_sums_give_the_scores_that_the_scorers_give(
    leave_one_out: tuple[dict[str, str], dict[str, list[str]]],
) -> None:
    from pycocoevalcap.bleu.bleu import Bleu

    given = dict(list(leave_one_out[0].items())[:50])
    references = {name: leave_one_out[1][name] for name in given}
    result = {name: [" ".join(tokens(text))] for name, text in given.items()}
    truth = {name: [" ".join(tokens(text)) for text in texts] for name, texts in references.items()}
    whole = Bleu(4).compute_score(truth, result, verbose=0)[0][3]
    assert point(captions.statistics(given, references), captions.formula)["bleu4"] == pytest.approx(
        whole, abs=1e-9
    )
