"""The tiny language model: a small Llama that reads a scene as text and talks about it.

It is to the tiny world what a chat model is to ours: before it meets a picture it can already answer from a
description. Where a picture will stand, it has read either a caption or a *text picture*: a 4 x 4 grid in raster
order, for each patch that the vision tower will give the words of its place (what is there, and where that is),
summed as embeddings, since one visual token holds all that a patch shows.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from components import tiny_world
from components.backbones.tokenizer import END, PAD, START
from components.rule_teacher import rules
from components.tiny_world import PLACES, Thing

PATCHES_PER_SIDE = 4
CYCLES = ((2.5e-3, 4500), (1.5e-3, 4000))
"""Peak rate and steps; a second warm-up and fall binds what the first left loose."""
BATCH = 16
WARM_UP = 150
SORTED_BATCHES = 16
TURNS = 8
PLAIN_SHARE = 0.08
NOTES_SHARE = 0.3
NOTES = 8
DETAIL_SHARE = 0.03
REASONING_SHARE = 0.02
TEXT_PICTURE_SHARE = 0.7
WORD_DROP = 0.1
WORDS_AT_MOST = 5
IGNORED = -100
SLOT = PAD * PATCHES_PER_SIDE**2
NEEDS_PLACES = {"where", "what", "relation", "reasoning", "detail"}


TextPicture = tuple[tuple[str, ...], ...]
"""The words of each patch, patches in raster order."""


@dataclass(frozen=True)
class Sample:
    """What stands where the picture would, and the turns about it; no turns: the picture, then a caption."""

    picture: "str | TextPicture"
    turns: tuple[tuple[str, str], ...]
    caption: str = ""

    @property
    def texts(self) -> list[str]:
        """Every text in it, without what the chat format adds."""
        words = (
            [self.picture]
            if isinstance(self.picture, str)
            else [f" {w}" for patch in self.picture for w in patch]
        )
        return [*words, *(text for turn in self.turns for text in turn), self.caption]


@dataclass(frozen=True)
class Batch:
    """Right-padded; the padding needs no mask, since attention looks back only.

    `words_SW` holds the words of the patches, of all text pictures in order, padded; they stand at `slots_BL`.
    """

    ids_BL: Tensor
    labels_BL: Tensor
    slots_BL: Tensor
    words_SW: Tensor


def language_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """About 0.7 million weights."""
    hidden = 128
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=hidden**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def train_language(
    tokenizer: PreTrainedTokenizerFast, seed: int, say: Callable[[str], None]
) -> LlamaForCausalLM:
    """A Llama from nothing; loss on answers, on what ends them, and on captions that follow a text picture."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(language_config(tokenizer))
    for number in range(len(CYCLES)):
        train_cycle(model, tokenizer, seed, number, say)
        # As they are kept on disk, so that a cycle can start from what the one before left there.
        model.half().float()
    model.eval()
    return model


def train_cycle(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    number: int,
    say: Callable[[str], None],
) -> None:
    """Cycle `number` of `CYCLES`, on text of its own."""
    rate, steps = CYCLES[number]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=min(0.3, WARM_UP / steps), div_factor=100
    )
    batches = _batches(tokenizer, seed + 1000 * number)
    running = 0.0
    for step in range(1, steps + 1):
        loss = answer_loss(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        if step % 250 == 0:
            say(f"language: cycle {number + 1}, step {step}/{steps}, loss {running / 250:.4f}")
            running = 0.0


def _batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """Batches of samples of about one length, in random order."""
    samples = world_samples(seed, tiny_world.TRAIN)
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
        things = tiny_world.arrange(rng)
        if tiny_world.split_of(things) == split:
            yield sample(things, rng)


def sample(things: Sequence[Thing], rng: random.Random) -> Sample:
    """One sample about one scene."""
    where = tiny_world.boxes(things, rng)
    captions = tiny_world.captions(things, rng)
    objects = [(thing.category, box) for thing, box in zip(things, where, strict=True)]
    told = (captions, objects, tiny_world.SIDE, tiny_world.SIDE, rng)
    drawn = rng.random()
    if drawn < PLAIN_SHARE:
        return Sample(text_picture(things, rng), (), rng.choice(captions))
    if drawn < PLAIN_SHARE + NOTES_SHARE:
        told_by = (
            text_picture(things, rng)
            if rng.random() < TEXT_PICTURE_SHARE
            else rng.choice(captions[:-1]) + "\n"
        )
        return Sample(told_by, (), notes(things, rng))
    drawn -= NOTES_SHARE
    style: int | None
    picture: str | TextPicture
    if rng.random() < TEXT_PICTURE_SHARE:
        style, picture = None, text_picture(things, rng)
    else:
        style = rng.randrange(len(captions))
        picture = captions[style]
    turns: list[rules.Turn] = []
    if drawn < PLAIN_SHARE + DETAIL_SHARE:
        turns = [turn for turn in [rules.detail(*told)] if turn]
    elif drawn < PLAIN_SHARE + DETAIL_SHARE + REASONING_SHARE:
        turns = [turn for turn in [rules.reasoning(*told)] if turn]
    turns = turns or rules.conversation(*told, turns=TURNS, kinds=tiny_world.KINDS)
    if style == len(captions) - 1:
        turns = [turn for turn in turns if turn.kind not in NEEDS_PLACES]
    if not turns:
        return Sample(text_picture(things, rng), (), rng.choice(captions))
    return Sample(picture, tuple((turn.question, turn.answer) for turn in turns))


def notes(things: Sequence[Thing], rng: random.Random) -> str:
    """Facts in a row, each found by a shape, a colour, both or a place: binding, far denser than in questions."""
    keys = [
        (key, thing)
        for thing in things
        for key in (thing.shape, thing.colour, thing.category, PLACES[thing.cell])
        if sum(key in f"{other.phrase} {PLACES[other.cell]}" for other in things) == 1
    ]
    drawn = rng.sample(keys, min(NOTES, len(keys)))
    return "; ".join(f"{key}: {thing.phrase} {PLACES[thing.cell]}" for key, thing in drawn)


def text_picture(things: Sequence[Thing], rng: random.Random) -> TextPicture:
    """The scene in words: each place's four patches tell what is there and which place it is, with gaps."""
    at = {thing.cell: thing.phrase for thing in things}
    told = [f"{at.get(cell, 'empty')} {name}".split() for cell, name in enumerate(PLACES)]
    half = PATCHES_PER_SIDE // 2
    return tuple(
        tuple(word for word in told[row // half * 2 + column // half] if rng.random() >= WORD_DROP)
        for row, column in itertools.product(range(PATCHES_PER_SIDE), repeat=2)
    )


def pieces(sample: Sample) -> list[tuple[str, bool]]:
    """The rendered text in pieces, each with whether it is to be learnt."""
    picture = sample.picture if isinstance(sample.picture, str) else SLOT
    if not sample.turns:
        return [(picture, False), (sample.caption + "\n", True)]
    parts = []
    for number, (question, answer) in enumerate(sample.turns):
        slot = picture + "\n" if number == 0 else ""
        parts += [
            (f"{START}user\n{slot}{question}{END}\n{START}assistant\n", False),
            (f"{answer}{END}", True),
            ("\n", False),
        ]
    return parts


def batch(tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> Batch:
    """Ids, labels and text pictures of some samples."""
    rows = [pieces(one) for one in samples]
    encoded = iter(
        tokenizer([text for row in rows for text, _ in row], add_special_tokens=False)["input_ids"]
    )
    ids, labels, slots = [], [], []
    for one, row in zip(samples, rows, strict=True):
        row_ids: list[int] = []
        row_labels: list[int] = []
        for _, learnt in row:
            piece = next(encoded)
            row_ids += piece
            row_labels += piece if learnt else [IGNORED] * len(piece)
        ids.append(torch.tensor(row_ids))
        labels.append(torch.tensor(row_labels))
        slots.append(ids[-1].eq(tokenizer.pad_token_id) & (not isinstance(one.picture, str)))
    return Batch(
        _padded(ids, tokenizer.pad_token_id),
        _padded(labels, IGNORED),
        _padded(slots, 0),
        _words(tokenizer, samples),
    )


def hidden_states(model: LlamaForCausalLM, given: Batch) -> Tensor:
    """The last hidden states, (batch, length, width), with text pictures as sums of their words' embeddings."""
    embed = model.get_input_embeddings()
    sums_SH = (
        embed(given.words_SW) * given.words_SW.ne(int(model.config.pad_token_id or 0)).unsqueeze(-1)
    ).sum(1)
    embedded_BLH = embed(given.ids_BL).masked_scatter(given.slots_BL.unsqueeze(-1), sums_SH)
    last_BLH: Tensor = model.model(inputs_embeds=embedded_BLH).last_hidden_state
    return last_BLH


def answer_loss(model: LlamaForCausalLM, given: Batch) -> Tensor:
    """Mean cross-entropy over the supervised positions; only they meet the vocabulary."""
    labels_BL = given.labels_BL[:, 1:]
    wanted = labels_BL != IGNORED
    return functional.cross_entropy(
        model.lm_head(hidden_states(model, given)[:, :-1][wanted]), labels_BL[wanted]
    )


def _words(tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> Tensor:
    patches = [patch for one in samples if not isinstance(one.picture, str) for patch in one.picture]
    ids = {
        word: tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        for patch in patches
        for word in patch
    }
    rows = torch.full((len(patches), WORDS_AT_MOST), tokenizer.pad_token_id)
    for row, patch in zip(rows, patches, strict=True):
        known = [token for word in patch for token in ids[word]]
        row[: len(known)] = torch.tensor(known, dtype=torch.long)
    return rows


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
