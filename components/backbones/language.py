"""The tiny language model: a small Llama that reads a scene as text and talks about it.

It is to the tiny world what a chat model is to ours: before it meets a picture it can already answer from a
description. Where a picture will stand, it has read either a caption or a *text picture*: the words of a 4 x 4
grid in raster order, one word for each patch that the vision tower will give.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from components import shapes
from components.backbones.tokenizer import END, START
from components.instruct import rules
from components.shapes import PLACES, Thing

PATCHES_PER_SIDE = 4
STEPS = 3600
BATCH = 12
RATE = 2.5e-3
WARM_UP = 150
SORTED_BATCHES = 16
TURNS = 6
PLAIN_SHARE = 0.15
DETAIL_SHARE = 0.05
REASONING_SHARE = 0.05
TEXT_PICTURE_SHARE = 0.7
IGNORED = -100
NEEDS_PLACES = {"where", "what", "relation", "reasoning", "detail"}


@dataclass(frozen=True)
class Sample:
    """What stands where the picture would, and the turns about it; no turns: the picture, then a caption."""

    picture: str
    turns: tuple[tuple[str, str], ...]
    caption: str = ""

    @property
    def texts(self) -> list[str]:
        """Every text in it, without what the chat format adds."""
        return [self.picture, *(text for turn in self.turns for text in turn), self.caption]


def language_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """About 0.7 million weights."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def train_language(
    tokenizer: PreTrainedTokenizerFast, seed: int, say: Callable[[str], None], steps: int = STEPS
) -> LlamaForCausalLM:
    """A Llama from nothing; loss on answers, on what ends them, and on captions that follow a text picture."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(language_config(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=WARM_UP / steps, div_factor=100
    )
    batches = _batches(tokenizer, seed)
    running = 0.0
    for step in range(1, steps + 1):
        ids_BL, labels_BL = next(batches)
        loss = answer_loss(model, ids_BL, labels_BL)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        if step % 250 == 0:
            say(f"language: step {step}/{steps}, loss {running / 250:.4f}")
            running = 0.0
    return model.eval()


def _batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of samples of about one length, in random order."""
    samples = world_samples(seed, shapes.TRAIN)
    rng = random.Random(f"batches {seed}")
    while True:
        drawn = sorted(itertools.islice(samples, BATCH * SORTED_BATCHES), key=_letters)
        starts = list(range(0, len(drawn), BATCH))
        rng.shuffle(starts)
        for start in starts:
            yield batch(tokenizer, drawn[start : start + BATCH])


def _letters(one: Sample) -> int:
    return sum(len(text) for text, _ in pieces(one))


def world_samples(seed: int, split: str) -> Iterator[Sample]:
    """An endless mix of conversations, details, reasoning and captions about scenes of `split`, in text only."""
    rng = random.Random(f"language {seed} {split}")
    while True:
        things = shapes.arrange(rng)
        if shapes.split_of(things) == split:
            yield sample(things, rng)


def sample(things: Sequence[Thing], rng: random.Random) -> Sample:
    """One sample about one scene."""
    where = shapes.boxes(things, rng)
    captions = shapes.captions(things, rng)
    objects = [(thing.category, box) for thing, box in zip(things, where, strict=True)]
    told = (captions, objects, shapes.SIDE, shapes.SIDE, rng)
    drawn = rng.random()
    if drawn < PLAIN_SHARE:
        return Sample(text_picture(things, rng), (), rng.choice(captions))
    if rng.random() < TEXT_PICTURE_SHARE:
        picture, style = text_picture(things, rng), None
    else:
        style = rng.randrange(len(captions))
        picture = captions[style]
    turns: list[rules.Turn] = []
    if drawn < PLAIN_SHARE + DETAIL_SHARE:
        turns = [turn for turn in [rules.detail(*told)] if turn]
    elif drawn < PLAIN_SHARE + DETAIL_SHARE + REASONING_SHARE:
        turns = [turn for turn in [rules.reasoning(*told)] if turn]
    turns = turns or rules.conversation(*told, turns=TURNS)
    if style == len(captions) - 1:
        turns = [turn for turn in turns if turn.kind not in NEEDS_PLACES]
    if not turns:
        return Sample(text_picture(things, rng), (), rng.choice(captions))
    return Sample(picture, tuple((turn.question, turn.answer) for turn in turns))


def text_picture(things: Sequence[Thing], rng: random.Random) -> str:
    """The scene as 4 x 4 words in raster order: each place's four patches tell its thing's size, colour and shape."""
    half = PATCHES_PER_SIDE // 2
    at = {thing.place: thing for thing in things}
    grid = [[""] * PATCHES_PER_SIDE for _ in range(PATCHES_PER_SIDE)]
    for place in range(len(PLACES)):
        words = ["empty"] * half**2
        if thing := at.get(place):
            words = [thing.size, thing.colour, thing.shape]
            words = rng.sample([*words, rng.choice(words)], half**2)
        for patch, word in enumerate(words):
            grid[place // 2 * half + patch // half][place % 2 * half + patch % half] = word
    return "".join(f" {word}" for row in grid for word in row)


def pieces(sample: Sample) -> list[tuple[str, bool]]:
    """The rendered text in pieces, each with whether it is to be learnt."""
    if not sample.turns:
        return [(sample.picture, False), (sample.caption + "\n", True)]
    parts = []
    for number, (question, answer) in enumerate(sample.turns):
        slot = sample.picture + "\n" if number == 0 else ""
        parts += [
            (f"{START}user\n{slot}{question}{END}\n{START}assistant\n", False),
            (f"{answer}{END}", True),
            ("\n", False),
        ]
    return parts


def batch(tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Ids and labels, right-padded; the padding needs no mask, since attention looks back only."""
    rows = [pieces(one) for one in samples]
    flat = tokenizer([text for row in rows for text, _ in row], add_special_tokens=False)["input_ids"]
    encoded = iter(flat)
    ids, labels = [], []
    for row in rows:
        row_ids: list[int] = []
        row_labels: list[int] = []
        for _, learnt in row:
            piece = next(encoded)
            row_ids += piece
            row_labels += piece if learnt else [IGNORED] * len(piece)
        ids.append(torch.tensor(row_ids))
        labels.append(torch.tensor(row_labels))
    pad = tokenizer.pad_token_id
    return (
        torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad),
        torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


def answer_loss(model: LlamaForCausalLM, ids_BL: Tensor, labels_BL: Tensor) -> Tensor:
    """Mean cross-entropy over the supervised positions; only they meet the vocabulary."""
    hidden_BLH = model.model(input_ids=ids_BL).last_hidden_state[:, :-1]
    wanted = labels_BL[:, 1:] != IGNORED
    return functional.cross_entropy(model.lm_head(hidden_BLH[wanted]), labels_BL[:, 1:][wanted])
