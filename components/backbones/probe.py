"""The gates that the tiny towers must pass before anything is built on them; every figure is a percentage.

The language model is given held-out scenes as text; a linear probe reads held-out scenes from the vision tower.
"""

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers import CLIPVisionModel, LlamaForCausalLM, PreTrainedTokenizerFast

from components import tiny_world
from components.backbones import language, vision
from components.rule_teacher import rules

QUESTIONS_EACH = 4
NOTHING = "nothing"
RIDGE = 1.0


@torch.no_grad()
def language_gates(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, scenes: int
) -> dict[str, float]:
    """Exact match of single questions about held-out scenes, by what told the scene and by the kind of question.

    A greedy answer is exact precisely when every token of the right one is the most probable after those before.
    """
    rng = random.Random(f"language gate {seed}")
    asked: list[tuple[str, str, language.Sample]] = []
    while len(asked) < scenes * QUESTIONS_EACH:
        things = tiny_world.arrange(rng)
        if tiny_world.split_of(things) != tiny_world.HELD_OUT_SPLIT:
            continue
        captions = tiny_world.captions(things, rng)
        objects = [(t.category, box) for t, box in zip(things, tiny_world.boxes(things, rng), strict=True)]
        told: list[str | language.TextPicture] = [language.text_picture(things, rng), *captions[:-1]]
        for turn in rules.conversation(
            captions, objects, tiny_world.SIDE, tiny_world.SIDE, rng, QUESTIONS_EACH, tiny_world.KINDS
        ):
            style = rng.randrange(len(told))
            name = "text pictures" if style == 0 else "captions"
            asked.append((name, turn.kind, language.Sample(told[style], ((turn.question, turn.answer),))))
    asked = asked[: scenes * QUESTIONS_EACH]
    right: dict[str, list[bool]] = {}
    for some in _chunks(asked, 64):
        given = language.batch(tokenizer, [sample for _, _, sample in some])
        guesses_BL = model.lm_head(language.hidden_states(model, given))[:, :-1].argmax(-1)
        labels_BL = given.labels_BL[:, 1:]
        exact_B = ((guesses_BL == labels_BL) | (labels_BL == language.IGNORED)).all(-1)
        for (told_by, kind, _), exact in zip(some, exact_B.tolist(), strict=True):
            for name in (f"answers from {told_by}", f"{kind} from {told_by}"):
                right.setdefault(name, []).append(exact)
    return {name: 100 * sum(marks) / len(marks) for name, marks in sorted(right.items())}


@torch.no_grad()
def vision_gates(tower: CLIPVisionModel, seed: int, scenes: int) -> dict[str, float]:
    """What a linear probe reads off the patch features of one place, in held-out scenes it was not fitted on.

    `scenes` training scenes fit the probe (ridge regression on one-hot labels), half as many held-out ones test it.
    `cell` is whether anything stands there; the others are judged where something does.
    """
    rng = random.Random(f"vision gate {seed}")
    fit_QF, fit_labels = _places(tower, rng, tiny_world.TRAIN, scenes)
    test_QF, test_labels = _places(tower, rng, tiny_world.HELD_OUT_SPLIT, scenes // 2)
    mean_F, std_F = fit_QF.mean(0), fit_QF.std(0) + 1e-6
    fit_QF, test_QF = (_with_bias((x_QF - mean_F) / std_F) for x_QF in (fit_QF, test_QF))
    figures = {}
    for name, labels in fit_labels.items():
        values = sorted(set(labels) - {NOTHING}) + ([NOTHING] if name == "place" else [])
        kept = [i for i, label in enumerate(labels) if label in values]
        wanted_QV = torch.eye(len(values))[[values.index(labels[i]) for i in kept]]
        x_QF = fit_QF[kept]
        weights_FV = torch.linalg.solve(x_QF.T @ x_QF + RIDGE * torch.eye(x_QF.shape[1]), x_QF.T @ wanted_QV)
        tested = [i for i, label in enumerate(test_labels[name]) if label in values]
        guesses = (test_QF[tested] @ weights_FV).argmax(-1).tolist()
        right = [values[g] == test_labels[name][i] for g, i in zip(guesses, tested, strict=True)]
        figures[f"{name} from patches"] = 100 * sum(right) / len(right)
    return figures


def _places(
    tower: CLIPVisionModel, rng: random.Random, split: str, scenes: int
) -> tuple[Tensor, dict[str, list[str]]]:
    """The patch features of every place of some scenes, (scenes x places, features), and what stands there."""
    drawn: list[list[tiny_world.Thing]] = []
    while len(drawn) < scenes:
        things = tiny_world.arrange(rng)
        if tiny_world.split_of(things) == split:
            drawn.append(things)
    features = []
    for some in _chunks(drawn, 64):
        pixels_BCHW = vision.pixels([vision.picture(things, rng) for things in some])
        hidden = tower(pixel_values=pixels_BCHW, output_hidden_states=True).hidden_states
        features.append(hidden[vision.READ_LAYER][:, 1:])
    features_BND = torch.cat(features)
    cells_N = torch.tensor(vision.patch_places())
    by_place = [features_BND[:, cells_N == cell].flatten(1) for cell in range(len(tiny_world.PLACES))]
    labels: dict[str, list[str]] = {name: [] for name in ("colour", "shape", "size", "place")}
    for things in drawn:
        at = {thing.cell: thing for thing in things}
        for cell in range(len(tiny_world.PLACES)):
            thing = at.get(cell)
            labels["place"].append("something" if thing else NOTHING)
            labels["colour"].append(thing.colour if thing else NOTHING)
            labels["shape"].append(thing.shape if thing else NOTHING)
            labels["size"].append(thing.size if thing else NOTHING)
    return torch.stack(by_place, 1).flatten(0, 1), labels


T = TypeVar("T")


def _with_bias(x_QF: Tensor) -> Tensor:
    return torch.cat([x_QF, torch.ones(len(x_QF), 1)], 1)


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
