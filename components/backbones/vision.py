"""The tiny vision tower: a small CLIP trained on scenes and what is said of them, its text half thrown away.

Two contrasts train it. CLIP's own sets whole pictures against captions, in batches where every scene stands
beside a copy with one attribute changed, so that shape counts as much as colour. The second sets every patch of
the layer that LLaVA reads against the phrases of all things, as RegionCLIP does for regions (arXiv 2112.09106).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from components import tiny_world
from components.tiny_world import COLOURS, PLACES, SHAPES, SIZES, Thing

PATCH = 16
WIDTH = 128
READ_LAYER = -2
EMPTY = "empty"
STEPS = 1800
PAIRS = 32
RATE = 1e-3
WARM_UP = 150
MEAN = [0.85, 0.85, 0.85]
STD = [0.25, 0.25, 0.25]
PHRASES = [EMPTY, *(f"{s} {c} {shape}" for s, c, shape in product(SIZES, COLOURS, SHAPES))]


def vision_config(tokenizer: PreTrainedTokenizerFast) -> CLIPConfig:
    """A vision tower of about 0.9 million weights and a text tower that is half as wide."""
    end = len(tokenizer)
    return CLIPConfig(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": tiny_world.SIDE,
            "patch_size": PATCH,
            "hidden_act": "gelu",
        },
        text_config={
            "vocab_size": end + 1,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": end,
        },
        projection_dim=64,
    )


def image_processor() -> CLIPImageProcessorPil:
    """CLIP's preprocessing at 64 px, on Pillow."""
    side = tiny_world.SIDE
    return CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=MEAN,
        image_std=STD,
    )


def train_vision(
    tokenizer: PreTrainedTokenizerFast, seed: int, say: Callable[[str], None], steps: int = STEPS
) -> CLIPVisionModel:
    """A CLIP from nothing; returns its vision tower."""
    torch.manual_seed(seed)
    rng = random.Random(f"vision {seed}")
    clip = CLIPModel(vision_config(tokenizer)).train()
    to_text = nn.Linear(WIDTH, clip.config.projection_dim)
    weights = [*clip.parameters(), *to_text.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=min(0.3, WARM_UP / steps), div_factor=100
    )
    phrase_ids_PL = _text(tokenizer, PHRASES)
    running = torch.zeros(2)
    for step in range(1, steps + 1):
        scenes = [scene for _ in range(PAIRS) for scene in _pair(rng)]
        pixels_BCHW = pixels([picture(things, rng) for things in scenes])
        caption_ids_BL = _text(
            tokenizer, [rng.choice(tiny_world.captions(things, rng)[:2]) for things in scenes]
        )
        vision = clip.vision_model(pixel_values=pixels_BCHW, output_hidden_states=True)
        scale = clip.logit_scale.exp().clamp(max=100.0)

        images_BD = functional.normalize(clip.visual_projection(vision.pooler_output), dim=-1)
        captions_BD = _embed(clip, caption_ids_BL)
        logits_BB = scale * images_BD @ captions_BD.T
        own_B = torch.arange(len(scenes))
        whole = functional.cross_entropy(logits_BB, own_B) + functional.cross_entropy(logits_BB.T, own_B)

        patches_BND = functional.normalize(to_text(vision.hidden_states[READ_LAYER][:, 1:]), dim=-1)
        logits_BNP = scale * patches_BND @ _embed(clip, phrase_ids_PL).T
        parts = functional.cross_entropy(logits_BNP.flatten(0, 1), patch_phrases(scenes).flatten())

        (whole / 2 + parts).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        running += torch.tensor([whole.item() / 2, parts.item()])
        if step % 250 == 0:
            whole_mean, parts_mean = (running / 250).tolist()
            say(
                f"vision: step {step}/{steps}, loss of pictures {whole_mean:.4f}, of patches {parts_mean:.4f}"
            )
            running = torch.zeros(2)
    return _tower(clip)


def picture(things: Sequence[Thing], rng: random.Random) -> np.ndarray:
    """The drawn scene, uint8, (64, 64, 3)."""
    return np.asarray(tiny_world.draw(things, tiny_world.boxes(things, rng), rng))


def pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    """What the image processor makes of pictures that have its size already: (batch, 3, 64, 64)."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (stacked - mean) / std


def patch_places() -> list[int]:
    """The place that each patch lies in, patches in raster order."""
    side = tiny_world.SIDE // PATCH
    return [
        row * PATCH // tiny_world.CELL * 2 + col * PATCH // tiny_world.CELL
        for row in range(side)
        for col in range(side)
    ]


def patch_phrases(scenes: Sequence[Sequence[Thing]]) -> Tensor:
    """For each patch the number of the phrase that tells the thing of its place: (batch, patches)."""
    rows = []
    for things in scenes:
        at = {thing.cell: PHRASES.index(thing.phrase) for thing in things}
        rows.append([at.get(cell, 0) for cell in patch_places()])
    return torch.tensor(rows)


def _pair(rng: random.Random) -> tuple[list[Thing], list[Thing]]:
    """A training scene and its copy with one attribute of one thing changed, shape most often."""
    while True:
        things = tiny_world.arrange(rng)
        number = rng.randrange(len(things))
        one = things[number]
        free = [cell for cell in range(len(PLACES)) if cell not in {thing.cell for thing in things}]
        changes = [
            *[replace(one, shape=shape) for shape in SHAPES if shape != one.shape] * 2,
            replace(one, colour=rng.choice([colour for colour in COLOURS if colour != one.colour])),
            replace(one, size=rng.choice([size for size in SIZES if size != one.size])),
            replace(one, cell=rng.choice(free)),
        ]
        swapped = sorted([*things[:number], rng.choice(changes), *things[number + 1 :]])
        if tiny_world.split_of(things) == tiny_world.split_of(swapped) == tiny_world.TRAIN:
            return things, swapped


def _text(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Ids of each text and CLIP's end token, right-padded."""
    end = len(tokenizer)
    rows = [
        torch.tensor([*ids, end]) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)


def _embed(clip: CLIPModel, ids_BL: Tensor) -> Tensor:
    pooled_BH = clip.text_model(input_ids=ids_BL).pooler_output
    return functional.normalize(clip.text_projection(pooled_BH), dim=-1)


def _tower(clip: CLIPModel) -> CLIPVisionModel:
    vision: Any = clip.config.vision_config
    tower = CLIPVisionModel(vision)
    source = clip.vision_model.state_dict()
    names = {name: name.removeprefix("vision_model.") for name in tower.state_dict()}
    tower.load_state_dict({name: source[bare] for name, bare in names.items()})
    tower.eval()
    return tower
