"""Every family of causal language models that transformers knows: trained and asked as by itself, or refused.

    python -m benchmarks.model_zoo                     # all families; prints the table
    python -m benchmarks.model_zoo llama mpt lfm2      # some of them
    python -m benchmarks.model_zoo --out docs/model-zoo.md

For each a small random copy of its default config is measured as `backbones` does (`llava.faithful`). One that is taken
is then joined with a tower and a projector, saved, and loaded by stock transformers from the folder alone: the loss of
a sample with a picture, packed behind another one, is compared with what the stock model computes for it alone.
The status is 1 where one that was taken differs, or anything ends in a traceback.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from components.backbones.shipped import LANGUAGE, TOWERS
from llava import faithful, generate, pretrained
from llava import model as models
from llava.attention import segments
from llava.conversation import Encoder
from llava.data.collate import PackedRow
from llava.errors import RefusedInput
from llava.miniature import miniatures
from llava.packing import MASKED, ties
from llava.pixels import Pixels

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_CONVOLUTIONS: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": ["conv", "conv", "full_attention"] * 2,
}
_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": _EXPERTS,
    "dots1": _EXPERTS,
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS,
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
}
"""What a released config says and the default leaves open."""

ROUNDING = 1e-4
EQUAL, DIFFERS, REFUSED, NO_COPY, TRACEBACK = "equal", "DIFFERS", "refused", "no copy", "TRACEBACK"


@dataclass(frozen=True)
class Row:
    """What came of one family."""

    family: str
    outcome: str
    told: str
    """How it is packed, or why it is refused."""
    difference: float | None
    """Relative difference of the loss, ours packed against stock alone from the saved folder."""
    seconds: float


def measure(family: str) -> Row:
    """Measure one family, through a folder on disk where it is taken."""
    began = time.monotonic()

    def row(outcome: str, told: str, difference: float | None = None) -> Row:
        return Row(family, outcome, told, difference, time.monotonic() - began)

    try:
        config = AutoConfig.for_model(family, **SETTINGS.get(family, {}))
    except Exception as error:  # transformers' own defaults contradict each other
        return row(NO_COPY, f"transformers has no default of it ({type(error).__name__})")
    try:
        faithful.check_language_model(config)
        language = next(miniatures(config))
        told = _how(language)
        difference = through_a_folder(language)
    except RefusedInput as error:
        reason = str(error).partition(": ")[2].partition(f"; {faithful.ADVICE}")[0]
        return row(NO_COPY if faithful.NO_COPY in reason else REFUSED, reason)
    except Exception as error:
        return row(TRACEBACK, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return row(EQUAL if difference <= ROUNDING else DIFFERS, told, difference)


def _how(language: PreTrainedModel) -> str:
    ways = ["mask over the row" if language.config.model_type in MASKED else "segments"]
    if getattr(language.config, "tie_word_embeddings", False) and not ties(language):
        ways.append("the head becomes a copy of the embedding")
    return ", ".join(ways)


def through_a_folder(language: PreTrainedModel) -> float:
    """Join, save, load by stock transformers; the relative difference of one sample's loss."""
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tower = CLIPVisionModel(
        CLIPVisionConfig(**small, num_attention_heads=2, image_size=64, patch_size=16)
    ).eval()
    pictures = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    tokenizer = pretrained.tokenizer(TOWERS / LANGUAGE)
    model, processor = models.join(tower, language, tokenizer, pictures, "chatml", seed=3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.save(model, processor, folder, "chatml")
        # As a training worker begins, and as an evaluation ends.
        ours = packed_loss(models.load(folder, torch.float32), models.load_processor(folder))
        generate.load(folder)
        theirs = stock_loss(folder)
    return abs(ours - theirs) / abs(theirs)


def sample(processor: Any, image_tokens: int) -> tuple[list[int], list[int], Image.Image]:
    """Ids and labels of one conversation about a picture of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    turns = [
        {"from": "human", "value": "<image>\nWhat is in the picture?"},
        {"from": "gpt", "value": "Noise, grey."},
    ]
    encoded = Encoder(processor.tokenizer, "chatml", image_tokens).encode(turns, images=1)
    return encoded.ids, encoded.labels, Image.fromarray(pixels)


@torch.no_grad()
def packed_loss(model: Any, processor: Any) -> float:
    """The training forward's loss of the sample, packed behind another one."""
    ids, labels, picture = sample(processor, models.image_tokens(model.config))
    pixels = Pixels(processor.image_processor)
    before = ids[-20:]
    supervised = [position for position in range(1, len(ids)) if labels[position] >= 0]
    slots = [len(before) + at for at, token in enumerate(ids) if token == model.config.image_token_index]
    row = PackedRow(
        input_ids=torch.tensor(before + ids),
        position_ids=torch.tensor([*range(len(before)), *range(len(ids))]),
        segments=segments([len(before), len(ids)]),
        image_positions=torch.tensor(slots),
        pixels=torch.from_numpy(pixels(picture)[None]),
        predict=torch.tensor([len(before) + position - 1 for position in supervised]),
        targets=torch.tensor([ids[position] for position in supervised]),
    )
    return float(models.LlavaForTraining(model, pixels)(row))


@torch.no_grad()
def stock_loss(folder: Path) -> float:
    """The same sample alone, through what stock transformers loads."""
    stock = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    ids, labels, picture = sample(processor, stock.config.image_seq_length)
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    logits = stock(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum"))


def table(rows: list[Row]) -> str:
    """As Markdown, with the counts before it."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.outcome] = counts.get(row.outcome, 0) + 1
    lines = [
        ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        + f" of {len(rows)} families; transformers {transformers.__version__}, torch {torch.__version__}, fp32, CPU.",
        "",
        "| family | outcome | packed by, or reason | loss off by |",
        "|---|---|---|---|",
    ]
    for row in rows:
        told = row.told.replace("|", "\\|").replace("<", "&lt;")
        off = "" if row.difference is None else f"{row.difference:.0e}"
        lines.append(f"| `{row.family}` | {row.outcome} | {told} | {off} |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Which language models can be trained

`backbones` measures each language model on a small random copy of its config: its kinds of layers and its settings
stay, its widths and their number shrink. The copy is put into a stock LLaVA. Losses and gradients of a sample in a
row of its own, beside another sample and behind two, and what it would answer, must be those of the language model
by itself. What differs is refused by name before anything is made. This table says what came of the default config
of families that transformers knows; another config of the same family is measured anew. How long a sample may be is
measured apart, with your `max_length`: GPT-OSS, for one, is refused beyond its window of 128 tokens.

    python -m benchmarks.model_zoo --out docs/model-zoo.md

*equal*: taken; joined with a tower, saved, and loaded by stock transformers, its loss is as near as the last column
says. *segments*: its attention is told where samples end. *mask*: it gets a mask of a row's length squared, so keep
`tokens_per_row` small. *refused*: in one line, by `backbones`. *no copy*: refused as
well, since no small copy of it could be made to measure it.

"""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all where none is named")
    parser.add_argument("--out", type=Path, help="a Markdown file to write the table to")
    options = parser.parse_args()
    if unknown := sorted(set(options.families) - set(FAMILIES)):
        parser.error(
            f"transformers {transformers.__version__} has no causal language model {', '.join(unknown)}"
        )
    models.quiet()
    rows = []
    for family in options.families or FAMILIES:
        rows.append(measure(family))
        print(
            f"{family}: {rows[-1].outcome}, {rows[-1].told} ({rows[-1].seconds:.1f} s)",
            file=sys.stderr,
            flush=True,
        )
        if options.out:  # After each, so that a run that is stopped leaves what it measured.
            options.out.write_text(INTRODUCTION + table(rows))
    print(table(rows))
    return int(any(row.outcome in (DIFFERS, TRACEBACK) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
