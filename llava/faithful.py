"""Whether training on packed rows computes what stock transformers computes for each sample alone: it is measured.

A list of the properties that would make a difference (recurrent state, convolutions, windows, caps, positions that
look at the whole row) is never complete. So a small random copy of the language model is put into a stock LLaVA,
and losses, gradients, and what it would answer are compared with the language model by itself.
"""

import copy
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from llava.attention import segments
from llava.errors import RefusedInput
from llava.miniature import miniatures
from llava.packing import layers_of, packed_hidden_states, set_packing, ties

LOSS, GRADIENT = 1e-4, 2e-3
"""Largest relative difference that is rounding: of a loss, and of all gradients as one vector."""
LONGEST = 8192
_LENGTHS = (61, 47, 12, 33)
NO_COPY = "no small copy of it can be made to measure whether it can be packed"
ADVICE = "a plain decoder such as llama, mistral, qwen2 or qwen3 can be trained"


def check_language_model(config: Any) -> None:
    """Raise `RefusedInput` where a LLaVA around a language model of that config would not train or answer as it should.

    Takes seconds: the measurement is made on a small copy of its layers.
    """
    if reason := _remembered(config, 0):
        raise RefusedInput(f"language model of type {config.model_type!r}: {reason}; {ADVICE}")


def check_length(config: Any, max_length: int) -> None:
    """Raise `RefusedInput` where samples of `max_length` tokens would be trained otherwise than stock reads them.

    What a window, a chunk or scaled positions change begins behind a length; it is looked for with a sample as long
    as may come, up to 8,192 tokens.
    """
    if reason := _remembered(config, max(3, min(max_length, LONGEST))):
        raise RefusedInput(
            f"language model of type {config.model_type!r}: {reason}; set max_length to what it reads whole "
            f"(it is {max_length})"
        )


_found: dict[tuple[str, int], str | None] = {}
"""What was measured in this process, by the config as text and the length; stages of one workflow ask the same."""


def _remembered(config: Any, length: int) -> str | None:
    """What differs, or None; of samples of `length` tokens, or with 0 of short ones in every respect."""
    key = json.dumps(config.to_dict(), sort_keys=True, default=str), length
    if key not in _found:
        _found[key] = _on_a_copy(
            config, functools.partial(_difference_of_length, length=length) if length else _difference
        )
    return _found[key]


def _on_a_copy(config: Any, measure: Callable[[PreTrainedModel], str | None]) -> str | None:
    try:
        text_alone = config.get_text_config() is config
    except ValueError:  # several of them
        text_alone = False
    if not text_alone:
        return "it has parts for more than text; give a causal language model of text alone"
    failed: list[str] = []
    for language in miniatures(config, failed):
        try:
            _alone(language, _sample(language, 8))
        except Exception as error:  # The copy does not compute by itself: its widths do not go together.
            failed.append(_one_line(error))
            continue
        try:
            return measure(language)
        except RefusedInput as error:
            return str(error)
        except Exception as error:
            return f"inside a stock LLaVA it fails ({_one_line(error)})"
    return f"{NO_COPY} ({failed[-1] if failed else 'it is too large'})"


def _difference(language: PreTrainedModel) -> str | None:
    model = stock_around(language)
    for look in (_names, _pictures, _text, _rows, _answers):
        if reason := look(model, language):
            return reason
    return None


def _difference_of_length(language: PreTrainedModel, length: int) -> str | None:
    model = stock_around(language)
    ids = [_sample(language, count) for count in (19, length - 1)]
    with torch.no_grad():
        try:
            alone = [_alone(language, one) for one in ids]
        except (IndexError, RuntimeError, ValueError) as error:
            return f"it cannot read {length - 1} tokens ({_one_line(error)})"
        set_packing(model.model.language_model)
        packed = _packed(model, ids)
    for one, other, count in zip(packed, alone, (19, length - 1), strict=True):
        if not _close(float(one), float(other), LOSS):
            return (
                f"the loss of a sample of {count} tokens packed with one of {length - 1} is {float(one):.4f}, "
                f"alone {float(other):.4f}: it reads long samples otherwise (a window, chunks, or scaled positions)"
            )
    return None


def stock_around(language: PreTrainedModel) -> LlavaForConditionalGeneration:
    """A stock LLaVA with a tower of no account and a copy of `language`'s weights. Raises `RefusedInput`."""
    tower = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=4,
    )
    text, tied = copy.deepcopy(language.config), ties(language)
    text.tie_word_embeddings = tied
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=0,
        vision_feature_layer=-1,
        tie_word_embeddings=tied,
    )
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration(config).float().eval()
    base = f"{language.base_model_prefix}."
    moved = {
        f"model.language_model.{name.removeprefix(base)}" if name.startswith(base) else name: value
        for name, value in language.state_dict().items()
    }
    report = model.load_state_dict(moved, strict=False)
    ours = ("model.vision_tower.", "model.multi_modal_projector.")
    lost = [*report.unexpected_keys, *(name for name in report.missing_keys if not name.startswith(ours))]
    if lost:
        raise RefusedInput(f"a stock LLaVA has no place for all of its weights, such as {lost[0]}")
    model.tie_weights()
    return model


def _names(model: LlavaForConditionalGeneration, language: PreTrainedModel) -> str | None:
    text: Any = model.model.language_model
    layers_of(text)
    rows, known = text.get_input_embeddings().weight.shape[0], language.config.vocab_size
    if rows != known:
        return f"its embedding has {rows} rows for a vocabulary of {known}"
    return None


def _pictures(model: LlavaForConditionalGeneration, language: PreTrainedModel) -> str | None:
    """Features of pictures are embeddings of no token; some types look tokens up by their embeddings."""
    text: Any = model.model.language_model
    like: Any = text.get_input_embeddings()(_sample(language, 6).unsqueeze(0))
    try:
        text(inputs_embeds=torch.randn_like(like), use_cache=False)
    except Exception as error:
        return f"it takes no embeddings but those of tokens, so no pictures ({_one_line(error)})"
    return None


def _text(model: LlavaForConditionalGeneration, language: PreTrainedModel) -> str | None:
    ids = _sample(language, 40)
    with torch.no_grad():
        ours = model(input_ids=ids.unsqueeze(0), use_cache=False).logits
        theirs = language(input_ids=ids.unsqueeze(0), use_cache=False).logits
    if not _close_all(ours, theirs):
        return "inside a stock LLaVA its logits differ from its own (its head is more than a projection)"
    return None


def _rows(model: LlavaForConditionalGeneration, language: PreTrainedModel) -> str | None:
    """Each sample in a row of its own, beside another, and behind two."""
    ids = [_sample(language, count) for count in _LENGTHS]
    text: Any = model.model.language_model
    before = text.config._attn_implementation
    set_packing(text)
    untied = bool(getattr(language.config, "tie_word_embeddings", False)) and not ties(language)
    for number in (0, 1):
        alone = _gradients(language, _alone(language, ids[number]), False)
        for row, at, how in (
            ([ids[number]], 0, "in a row of its own"),
            ([ids[0], ids[1]], number, "packed with another sample"),
            ([ids[2], ids[3], ids[number]], 2, "packed behind two other samples"),
        ):
            ours = _gradients(model, _packed(model, row)[at], untied)
            if wrong := _compare(ours, alone):
                return f"{how}, a sample's {wrong}"
    if text.config._attn_implementation != before:
        text.set_attn_implementation(before)
    return None


def _answers(model: Any, language: Any) -> str | None:
    """Three greedy tokens with a cache."""
    ids = _sample(language, 24).unsqueeze(0)
    settings: dict[str, Any] = {
        "max_new_tokens": 3,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 1,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    mask = torch.ones_like(ids)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        ours = model.generate(input_ids=ids, inputs_embeds=embeds, attention_mask=mask, **settings).logits
        theirs = language.generate(input_ids=ids, attention_mask=mask, **settings).logits
    if not _close_all(torch.stack(ours), torch.stack(theirs)):
        return "inside a stock LLaVA it answers otherwise than by itself"
    return None


def _sample(language: PreTrainedModel, count: int) -> torch.Tensor:
    """Ids, (count,), none of them a token with a meaning of its own."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, language.config.vocab_size, (count,), generator=generator)


def _alone(language: PreTrainedModel, ids_T: torch.Tensor) -> torch.Tensor:
    """The summed loss by the stock causal language model."""
    logits_TV = language(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0]
    return _loss(logits_TV, ids_T)


def _packed(model: LlavaForConditionalGeneration, row: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The summed loss of each sample of a row, as training computes it."""
    text: Any = model.model.language_model
    head: Any = model.lm_head
    embed: Any = model.get_input_embeddings()
    lengths = [len(ids) for ids in row]
    hidden_TD = packed_hidden_states(
        text,
        embed(torch.cat(list(row))),
        torch.cat([torch.arange(length) for length in lengths]),
        segments(lengths),
    )
    return [_loss(head(hidden), ids) for hidden, ids in zip(hidden_TD.split(lengths), row, strict=True)]


def _loss(logits_TV: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="sum")


def _gradients(
    model: PreTrainedModel, loss: torch.Tensor, untied: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the gradient of each parameter by the end of its name, which stock LLaVA leaves as it is.

    `untied`: embedding and head are one by themselves and two in this model; their sum is given for the embedding.
    """
    named = {
        _bare(name, model): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "vision_tower" not in name and "multi_modal_projector" not in name
    }
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    gradients = {name: each for name, each in zip(named, found, strict=True) if each is not None}
    if untied and "lm_head.weight" in gradients:
        embedding = next(name for name, each in named.items() if each is model.get_input_embeddings().weight)
        gradients[embedding] = gradients.get(embedding, 0) + gradients.pop("lm_head.weight")
    return float(loss.detach()), gradients


def _bare(name: str, model: PreTrainedModel) -> str:
    return name.removeprefix("model.language_model.").removeprefix(f"{model.base_model_prefix}.")


def _compare(
    ours: tuple[float, dict[str, torch.Tensor]], alone: tuple[float, dict[str, torch.Tensor]]
) -> str | None:
    if not _close(ours[0], alone[0], LOSS):
        return f"loss is {ours[0]:.4f}, alone {alone[0]:.4f}"
    off = total = 0.0
    for name in ours[1].keys() | alone[1].keys():
        zero = torch.zeros(1, dtype=torch.float64)
        one, other = (found[1].get(name, zero).double() for found in (ours, alone))
        off += float((one - other).pow(2).sum())
        total += float(other.pow(2).sum())
    relative = (off / total) ** 0.5 if total else 0.0
    if not relative <= GRADIENT:
        return f"gradients are off by {relative:.2g} of their size"
    return None


def _close(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance * max(abs(other), 1e-6)


def _close_all(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and bool(
        (ours.double() - theirs.double()).norm() <= 1e-4 * theirs.double().norm()
    )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
