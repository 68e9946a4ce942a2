"""Models of random weights and seeded data with the lengths of LLaVA's.

Captions have 10 to 25 tokens. Conversations have 50 to 600, log-normal around 150, so that most are short and a
few are long; a question takes 8 to 20 of them, the answers take the rest. One token is one byte, so that the
lengths are exact whatever the vocabulary's size.
"""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pyarrow import fs
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from llava.conversation import IMAGE, Encoder
from llava.data.plan import BatchPlan, scan
from llava.data.reader import ParquetRows
from llava.data.samples import VIEWS
from llava.data.schema import write_rows
from llava.model import set_trainable
from llava.pixels import Pixels
from llava.sizes import CLIP_L14_336, VICUNA_7B, LanguageSizes, Sizes, Training
from llava.towers.clip import ClipSizes

MEDIAN, SPREAD, SHORTEST, LONGEST = 150, 0.7, 50, 600
MAX_LENGTH = 2048


@dataclass(frozen=True)
class Stage:
    """What a stage trains, on which view of the data."""

    number: int
    view: str
    template: str
    parts: tuple[str, ...]
    training: Training


STAGES = {
    1: Stage(1, "captions", "plain", ("projector",), "frozen"),
    2: Stage(2, "conversations", "chatml", ("projector", "language_model"), "full"),
}


@dataclass(frozen=True)
class Batch:
    """How a global batch is cut."""

    samples: int
    """Of the global batch."""
    micro: int
    """Samples per forward pass of the padding side: 32 and 16, as in the recipes of v1.5."""
    tokens_per_row: int
    """Budget of one packed row on our side."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and the global batch of each stage."""

    sizes: Sizes
    batches: dict[int, Batch]


SHAPES = {
    # The towers that the tiny preset ships, with the vocabulary of a small tokenizer for real text.
    "tiny": Shape(
        Sizes(
            ClipSizes(128, 512, 4, 4, 64, 16),
            LanguageSizes(128, 256, 4, 4, 4, 32, 8192, tied=True),
        ),
        {1: Batch(64, 32, 2048), 2: Batch(32, 16, 2048)},
    ),
    # The proportions of 7B: the tower and the vocabulary take about 2 % of the operations each.
    "7b-like": Shape(
        Sizes(
            ClipSizes(96, 384, 6, 3, 224, 14),
            LanguageSizes(256, 688, 8, 4, 4, 64, 512),
        ),
        {1: Batch(32, 32, 4096), 2: Batch(16, 16, 4096)},
    ),
    "7b": Shape(
        Sizes(CLIP_L14_336, VICUNA_7B),
        {1: Batch(64, 32, 12288), 2: Batch(32, 16, 16384)},
    ),
}


@dataclass
class World:
    """One stage's model and data. Every side of the comparison uses these very objects."""

    shape: Shape
    stage: Stage
    batch: Batch
    model: LlavaForConditionalGeneration
    encoder: Encoder
    pixels: Pixels
    image_processor: Any
    rows: ParquetRows
    plan: BatchPlan


def shape_of(name: str, vocabulary: int | None = None) -> Shape:
    """One of `SHAPES`, perhaps with another number of tokens."""
    shape = SHAPES[name]
    if vocabulary is None:
        return shape
    return replace(
        shape, sizes=replace(shape.sizes, language=replace(shape.sizes.language, vocabulary=vocabulary))
    )


def make_world(
    shape: Shape, stage: int, steps: int, seed: int, folder: Path, device: torch.device, dtype: torch.dtype
) -> World:
    """Data for `steps` global batches in `folder`, and a model of random weights made on `device`."""
    kind = STAGES[stage]
    batch, sizes = shape.batches[stage], shape.sizes
    tokenizer = byte_tokenizer()
    edge = sizes.vision.image
    processor = CLIPImageProcessorPil(size={"height": edge, "width": edge}, do_center_crop=False)
    encoder = Encoder(tokenizer, kind.template, sizes.image_tokens, MAX_LENGTH)
    data = folder / f"stage-{stage}.parquet"
    write_rows(data, _samples(kind, encoder, sizes, batch.samples * steps, seed))
    rows = ParquetRows(fs.LocalFileSystem(), [str(data)], VIEWS[kind.view][1])
    index, _ = scan(rows, kind.view, encoder)
    return World(
        shape=shape,
        stage=kind,
        batch=batch,
        model=make_model(sizes, tokenizer, kind, seed, device, dtype),
        encoder=encoder,
        pixels=Pixels(processor),
        image_processor=processor,
        rows=rows,
        plan=BatchPlan(index, seed=seed, epochs=1, global_batch=batch.samples),
    )


def make_model(
    sizes: Sizes, tokenizer: Any, stage: Stage, seed: int, device: torch.device, dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    """A stock LLaVA of random weights, in training mode, of which the stage's parts learn."""
    vision, language = sizes.vision, sizes.language
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision.hidden,
            intermediate_size=vision.intermediate,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=vision.image,
            patch_size=vision.patch,
        ),
        text_config=LlamaConfig(
            hidden_size=language.hidden,
            intermediate_size=language.intermediate,
            num_hidden_layers=language.layers,
            num_attention_heads=language.heads,
            num_key_value_heads=language.kv_heads,
            head_dim=language.head,
            vocab_size=language.vocabulary,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=language.tied,
            max_position_embeddings=MAX_LENGTH,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=sizes.image_tokens,
        vision_feature_layer=sizes.feature_layer,
        tie_word_embeddings=language.tied,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(seed)
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    set_trainable(model, list(stage.parts))
    return model.train()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the special ones of chatml."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<|im_start|>", "<|im_end|>", IMAGE]
    bare.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<|im_end|>")


def _samples(stage: Stage, encoder: Encoder, sizes: Sizes, count: int, seed: int) -> list[Any]:
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        row: dict[str, Any] = {"id": f"{number:06d}", "image": _picture(random, sizes.vision.image)}
        if stage.view == "captions":
            row["captions"] = [_text(random, int(random.integers(10, 26)))]
        else:
            length = int(np.clip(random.lognormal(np.log(MEDIAN), SPREAD), SHORTEST, LONGEST))
            row["conversations"] = _conversation(random, encoder, sizes.image_tokens + length)
        rows.append(row)
    return rows


def _conversation(random: np.random.Generator, encoder: Encoder, tokens: int) -> list[dict[str, str]]:
    """Turns that come to exactly `tokens` when encoded; about one more exchange for every hundred tokens of text."""
    text = tokens - encoder.image_tokens
    turns = [
        {"from": speaker, "value": "a" if speaker == "gpt" else _text(random, int(random.integers(8, 21)))}
        for _ in range(1 + text // 100)
        for speaker in ("human", "gpt")
    ]
    turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
    left = tokens - len(encoder.encode(turns, 1).ids)
    answers = turns[1::2]
    shares = random.multinomial(left, random.dirichlet([2.0] * len(answers)))
    for turn, share in zip(answers, shares, strict=True):
        turn["value"] = _text(random, 1 + int(share))
    return turns


def _text(random: np.random.Generator, length: int) -> str:
    return "".join(random.choice(list("abcdefghijklmnopqrstuvwxyz   "), length))


def _picture(random: np.random.Generator, edge: int) -> dict[str, Any]:
    """A smooth picture as JPEG, of the tower's size: what the shards hold."""
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((edge, edge), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return {"bytes": file.getvalue(), "path": "picture.jpg"}
