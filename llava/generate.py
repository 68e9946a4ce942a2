"""Answers of a stock LLaVA folder: load it, ask questions about pictures in batches, measure the loss.

A question is user text: it is encoded with special tokens switched off, whatever it contains. A folder
whose chat template is one of ours gets the very ids that training used; any other folder is asked through
its own chat template.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

import llava.model
from llava import control_tokens, pretrained
from llava.conversation import IGNORE, Encoder
from llava.errors import RefusedInput
from llava.pixels import blank_picture
from llava.rendering import RenderingError
from llava.templates import NAMES, OWN, adds_begin, chat_template, is_chat
from llava.text_tokenizer import IMAGE

_TRIED = 500_000_000
"""Parameters of the layers that answer a trial question."""


def load(folder: str | Path, device: str = "cpu") -> tuple[Any, Any]:
    """Model (evaluation mode, SDPA attention, greedy) and processor of the stock LLaVA `folder`.

    Weights are read from safetensors only and no code from the folder is run. fp32 on CPUs, elsewhere the
    precision that the folder was saved in. Raises `RefusedInput` for a folder that is no LLaVA, or whose parts do not
    fit: one answer to a blank picture is tried.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise RefusedInput(f"{folder} holds no config.json: give a folder that `save_pretrained` wrote")
    on_cpu = torch.device(device).type == "cpu"
    with pretrained.reading(f"{folder} cannot be loaded"):
        saved = llava.model.dtype_of(llava.model.load_config(folder))
    model: Any = llava.model.load(folder, torch.float32 if on_cpu else saved)
    processor = llava.model.load_processor(folder)
    model = model.to(device)
    _make_ready(folder, model, processor)
    return model, processor


def _make_ready(folder: Path, model: Any, processor: Any) -> None:
    """Greedy, with the folder's own end and padding; one answer to a blank picture is tried."""
    # A folder may ask for sampling, penalties or beams; only where an answer ends is taken from it.
    tokenizer, vocabulary = processor.tokenizer, model.config.text_config.vocab_size
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    ends = end if isinstance(end, list) else [end]
    if end is None:
        raise RefusedInput(f"{folder} names no end token: set eos_token_id in generation_config.json")
    if any(one >= vocabulary for one in ends):
        raise RefusedInput(
            f"{folder}: eos_token_id is {end} in generation_config.json, the model has {vocabulary}"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = ends[0]
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    model.eval()
    with pretrained.reading(f"{folder} cannot answer a question"):
        answer(model, processor, ["?"], [blank_picture(processor.image_processor)], 1)


def try_out(folder: Path, model: Any, processor: Any, template: str) -> None:
    """One answer to one picture, as the model will be asked once it is trained with `template`; raises `RefusedInput`.

    Of a large language model only the first layers take part, so that it takes seconds; `model` is no use afterwards.
    """
    if is_chat(template) or not processor.chat_template:
        processor.chat_template = chat_template(template, processor.tokenizer)
    text = model.model.language_model
    if isinstance(layers := getattr(text, "layers", None), torch.nn.ModuleList) and len(layers):
        size = sum(parameter.numel() for parameter in layers[0].parameters())
        text.layers = layers[: max(1, _TRIED // size)]
    _make_ready(folder, model.float(), processor)


@torch.inference_mode()
def answer(
    model: Any,
    processor: Any,
    questions: Sequence[str],
    images: Sequence[Image.Image | None],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers, one per question; `images[i]` is None where a question has no picture.

    `model` and `processor` come from `load`. Padding is on the left and masked, so that an answer does
    not depend on what else is in the batch.
    """
    if not questions:
        return []
    pixels = [pixel_values(processor, image) for image in images]
    prompts = [prompt(processor, question, px) for question, px in zip(questions, pixels, strict=True)]
    batch = _batch(model, processor, prompts, pixels, side="left")
    encoder = _encoder(processor, None)
    stop = None if encoder is None else encoder.stop
    ending = {} if stop is None else {"stop_strings": [stop], "tokenizer": processor.tokenizer}
    written = model.generate(**batch, max_new_tokens=max_new_tokens, **ending)[
        :, batch["input_ids"].shape[1] :
    ]
    texts = processor.tokenizer.batch_decode(
        written, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [(text if stop is None else text.split(stop)[0]).strip() for text in texts]


@torch.inference_mode()
def answer_loss(
    model: Any,
    processor: Any,
    questions: Sequence[str],
    answers: Sequence[str],
    images: Sequence[Image.Image | None],
) -> tuple[list[float], list[int]]:
    """Negative log-likelihood (nats) of each expected answer and its end token, summed, and its tokens.

    Ids and labels are those of training, so the folder's template must be one of ours (`template_name`).
    """
    if template_name(processor) is None:
        raise RefusedInput(
            "the folder's chat template is none of ours: what training would supervise is unknown"
        )
    pixels = [pixel_values(processor, image) for image in images]
    samples = []
    for question, expected, px in zip(questions, answers, pixels, strict=True):
        encoder = _encoder(processor, px)
        assert encoder is not None
        turns = [{"from": "human", "value": _human(question, px)}, {"from": "gpt", "value": expected}]
        samples.append(encoder.encode(turns, images=int(px is not None)))
    batch = _batch(model, processor, [sample.ids for sample in samples], pixels, side="right")
    length = batch["input_ids"].shape[1]
    labels = torch.tensor([sample.labels + [IGNORE] * (length - len(sample.labels)) for sample in samples])
    targets = labels[:, 1:].to(model.device)
    supervised = targets != IGNORE
    # Only supervised positions reach the vocabulary projection: the logits of a whole batch are large.
    hidden = model.model(**batch).last_hidden_state[:, :-1][supervised]
    losses = cross_entropy(model.lm_head(hidden).float(), targets[supervised], reduction="none")
    counts = supervised.sum(dim=1).tolist()
    return [part.sum().item() for part in losses.split(counts)], counts


def prompt(processor: Any, question: str, px: torch.Tensor | None) -> list[int]:
    """Ids up to where the assistant begins to write; the image slot is already as long as `px` needs."""
    if (encoder := _encoder(processor, px)) is not None:
        return encoder.prompt([{"from": "human", "value": _human(question, px)}], images=int(px is not None))
    return _stock_prompt(processor, question, px)


def template_name(processor: Any) -> str | None:
    """Which of our templates wrote the folder's chat template; None where somebody else did."""
    found = _written_by(processor)
    return None if found is None else found[0]


def _written_by(processor: Any) -> tuple[str, bool] | None:
    """The template's name, and whether an earlier version wrote it, with a begin token that the tokenizer adds, too."""
    ways = (False, True) if adds_begin(processor.tokenizer) else (False,)
    for name in NAMES:
        try:
            for joined in ways:
                if processor.chat_template == chat_template(name, processor.tokenizer, joined):
                    return name, joined
        except RefusedInput:
            assert name == OWN
    return None


def _encoder(processor: Any, px: torch.Tensor | None) -> Encoder | None:
    """Writes as training did; None where the folder's chat template is none of ours."""
    if (found := _written_by(processor)) is None:
        return None
    name, joined = found
    slots = 0 if px is None else image_tokens(processor, px)
    return Encoder(processor.tokenizer, name, slots, joined=joined)


def pixel_values(processor: Any, image: Image.Image | None) -> torch.Tensor | None:
    """`image` as the vision tower reads it: (channels, height, width), normalised."""
    if image is None:
        return None
    pixels: torch.Tensor = processor.image_processor(image.convert("RGB"), return_tensors="pt")[
        "pixel_values"
    ][0]
    return pixels


def image_tokens(processor: Any, px: torch.Tensor) -> int:
    """Slots that the image `px` (channels, height, width) fills, counted as the stock processor does."""
    height, width = px.shape[-2:]
    patches = (height // processor.patch_size) * (width // processor.patch_size)
    dropped: bool = processor.vision_feature_select_strategy == "default"
    return int(patches + processor.num_additional_image_tokens) - dropped


def _human(question: str, px: torch.Tensor | None) -> str:
    return question if px is None else f"{IMAGE}\n{question}"


def _stock_prompt(processor: Any, question: str, px: torch.Tensor | None) -> list[int]:
    """The prompt of the folder's own chat template, with the question's special strings kept as text."""
    if not isinstance(processor.chat_template, str):
        raise RefusedInput(
            "the folder has no chat template of its own: add chat_template.jinja, so that a prompt is known"
        )
    tokenizer = processor.tokenizer
    parts = [{"type": "image"}] if px is not None else []
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    # The image slot is widened below: the stock processor would widen every literal slot of the text.
    ids = _encoded(tokenizer, processor.chat_template, turn)
    begin = tokenizer.bos_token_id
    # A template without a begin token leaves it to the tokenizer, as `processor(text=...)` does.
    if begin is not None and ids[:1] != [begin] and tokenizer.encode("")[:1] == [begin]:
        ids = [begin, *ids]
    slot = processor.image_token_id
    slots = ids.count(slot)
    if slots != (px is not None):
        raise RefusedInput(f"the folder's chat template writes {slots} image slots for one picture")
    times = 1 if px is None else image_tokens(processor, px)
    return [new for old in ids for new in ([old] * (times if old == slot else 1))]


def _encoded(tokenizer: Any, source: str, turn: dict[str, Any]) -> list[int]:
    """What `apply_chat_template` with `sanitize_control_tokens` gives, the text written within `render`'s limits."""
    try:
        return control_tokens.encoded(tokenizer, source, turn)
    except RenderingError as error:
        raise RefusedInput(f"the folder's chat template cannot be used: {error}") from error


def _batch(
    model: Any,
    processor: Any,
    ids: list[list[int]],
    pixels: list[torch.Tensor | None],
    side: str,
) -> dict[str, torch.Tensor]:
    """Padded `input_ids` and `attention_mask`, (batch, longest), and the pixels of those that have some."""
    batch = processor.tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
    batch = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    present = [px for px in pixels if px is not None]
    if present:
        batch["pixel_values"] = torch.stack(present).to(model.device, model.dtype)
    return batch
