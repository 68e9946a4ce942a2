"""What a LLaVA folder says twice: in config.json, by which the model computes, and for its processor, which writes
prompts.

What the processor's files leave out (those of older transformers do) is filled in from the config; what contradicts
it is refused in one line, before anything is trained or asked.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.errors import RefusedInput
from llava.towers import family_of

NOT_READ = "stock transformers cannot read what the tower's layers get; 1 is what the first gives"


def agree(folder: Path, config: Any, processor: Any) -> None:
    """Fill `processor` from `config`; raises `RefusedInput` with the folder's name where they contradict each other."""
    vision = config.vision_config
    said = _json(folder / "processor_config.json")
    wrong = (
        _layers(config)
        or _fill(processor, said, "patch_size", vision.patch_size)
        or _fill(processor, said, "vision_feature_select_strategy", config.vision_feature_select_strategy)
        # Older transformers wrote 0 for what nobody had told them.
        or _fill(
            processor, said, "num_additional_image_tokens", family_of(vision.model_type).before_patches, 0
        )
        or _image_length(config, _json(folder / "config.json"))
        or _tokens(config, processor)
        or _two_files(said.get("image_processor"), _json(folder / "preprocessor_config.json"))
        or _pixels(config, processor)
    )
    if wrong:
        raise RefusedInput(f"{folder}: {wrong}")
    _fill_padding(config, processor.tokenizer)


def features(config: Any) -> int:
    """Features that the tower gives for one picture. Raises `RefusedInput` for a tower that is not known."""
    vision: Any = config.vision_config
    before: int = family_of(vision.model_type).before_patches
    dropped = config.vision_feature_select_strategy == "default"
    return int((vision.image_size // vision.patch_size) ** 2 + before - dropped)


def _layers(config: Any) -> str | None:
    read, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    for layer in read if isinstance(read, list | tuple) else [read]:
        if layer == 0 and not isinstance(layer, bool):
            return f"vision_feature_layer 0: {NOT_READ}"
        if isinstance(layer, bool) or not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
            return f"vision_feature_layer is {read}, the tower has {layers} layers: {-layers - 1} to {layers}"
    return None


def _fill(processor: Any, said: dict[str, Any], name: str, value: Any, unsaid: object = None) -> str | None:
    if (other := said.get(name)) not in (None, unsaid, value):
        return (
            f"{name} is {other!r} in processor_config.json and {value!r} by config.json; make them the same"
        )
    setattr(processor, name, value)
    return None


def _image_length(config: Any, said: dict[str, Any]) -> str | None:
    given, tokens = said.get("image_seq_length"), features(config)
    if given is not None and given != tokens:
        return f"image_seq_length is {given}, the tower gives {tokens} features"
    config.image_seq_length = tokens
    return None


def _tokens(config: Any, processor: Any) -> str | None:
    tokenizer, vocabulary = processor.tokenizer, config.text_config.vocab_size
    slot = tokenizer.convert_tokens_to_ids(processor.image_token)
    if slot != config.image_token_index:
        return f"the tokenizer's image token is {slot}, the config's {config.image_token_index}"
    known = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if known > vocabulary:
        return f"the tokenizer knows {known} tokens, the model {vocabulary}"
    return None


def _two_files(nested: object, apart: dict[str, Any]) -> str | None:
    """Newer transformers reads what is done to images from the one file, older from the other."""
    nested = nested if isinstance(nested, dict) else {}
    for key in sorted(nested.keys() & apart.keys() - {"image_processor_type"}):
        if nested[key] != apart[key]:
            return (
                f"{key} is {nested[key]} in processor_config.json and {apart[key]} in preprocessor_config.json; "
                "make them the same"
            )
    return None


def _pixels(config: Any, processor: Any) -> str | None:
    """What the image processor makes of a wide and of a high picture fits into the tower."""
    edge, channels = config.vision_config.image_size, config.vision_config.num_channels
    for size in ((90, 60), (60, 90)):
        made = processor.image_processor(Image.new("RGB", size), return_tensors="np")["pixel_values"][0]
        if np.shape(made) != (channels, edge, edge):
            found = " x ".join(str(one) for one in np.shape(made))
            return (
                f"the image processor gives {found}, the tower takes {channels} x {edge} x {edge}: correct "
                "preprocessor_config.json"
            )
    return None


def _fill_padding(config: Any, tokenizer: Any) -> None:
    if tokenizer.pad_token is None:
        for named in (
            getattr(config, "pad_token_id", None),
            getattr(config.text_config, "pad_token_id", None),
        ):
            if named is not None and (token := tokenizer.convert_ids_to_tokens(named)) is not None:
                tokenizer.pad_token = token
                return


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; nothing where there is none. What is wrong with it was seen when it was loaded."""
    found = json.loads(path.read_bytes()) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
