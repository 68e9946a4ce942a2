"""The only place that loads anything with transformers: configs, weights, tokenizers, processors.

A folder may come from anybody. Nothing remote is asked, no code of the folder is run, weights are read from
safetensors only, and whatever is wrong with it is one line that names it.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llava.errors import LlavaError, RefusedInput, from_the_system

LAYERS, LONGEST_JSON = 2048, 256 << 20
_INDEX = "model.safetensors.index.json"
_OBJECTS = (
    "config.json",
    "generation_config.json",
    _INDEX,
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_SIZES = (
    "hidden_size",
    "image_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "patch_size",
    "vocab_size",
)
_COUNTED = re.compile(r"layers\.\d+\..*(weight|bias)$|multi_modal_projector\.")
"""Names of weights that are there as often as the config says."""
_CODE = ("attn_implementation", "experts_implementation")
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into a `RefusedInput` that begins with `what`.

    transformers and what it calls raise every kind of error for a folder that is not as it should be. What is no fault
    of the folder goes through: no memory, a full disk.
    """
    try:
        yield
    except (LlavaError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # A panic in the Rust of tokenizers is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if from_the_system(error):
            raise
        raise RefusedInput(f"{what}: {_one_line(error)}") from error


def config(kind: Any, folder: Path) -> Any:
    """The config of the transformers class `kind`."""
    with reading(f"{folder} cannot be loaded"):
        _check(folder)
        return kind.from_pretrained(folder, **_LOCAL)


def model(kind: Any, folder: Path, whole: bool = False, **how: Any) -> Any:
    """The model of the transformers class `kind`, with weights for all that it has.

    Weights that are missing, or have another shape, are refused: transformers would make them up. `whole`: so are
    layers that the config does not count, which transformers would leave out.
    """
    with reading(f"{folder} cannot be loaded"):
        _check(folder)
        loaded, report = kind.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **_LOCAL, **how
        )
    for key, fault in (
        ("missing_keys", "are missing"),
        ("mismatched_keys", "have another shape than in config.json"),
    ):
        if lost := sorted(str(name) for name in report[key]):
            raise RefusedInput(f"{folder}: {len(lost)} weights {fault}, such as {lost[0]}")
    left = sorted(str(name) for name in report["unexpected_keys"] if _COUNTED.search(str(name)))
    if whole and left:
        raise RefusedInput(f"{folder}: {len(left)} weights have no place by config.json, such as {left[0]}")
    return loaded


def causal_language_model(folder: Path) -> Any:
    """The language model that the folder's config names, in the precision it is stored in."""
    from transformers import AutoModelForCausalLM

    return model(AutoModelForCausalLM, folder, dtype="auto")


def any_config(folder: Path) -> Any:
    """The config of whatever kind the folder names."""
    from transformers import AutoConfig

    return config(AutoConfig, folder)


def random_language_model(config: Any) -> Any:
    """A causal language model of that config with the weights that its kind begins with, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def tokenizer(folder: Path) -> Any:
    """The tokenizer."""
    from transformers import AutoTokenizer

    with reading(f"{folder} has no tokenizer that can be loaded"):
        _check(folder)
        return AutoTokenizer.from_pretrained(folder, **_LOCAL)


def image_processor(folder: Path) -> Any:
    """The image processor, on Pillow: with torchvision the pixels differ."""
    from transformers import AutoImageProcessor

    with reading(f"{folder} has no image processor that can be loaded"):
        _check(folder)
        return AutoImageProcessor.from_pretrained(folder, backend="pil", **_LOCAL)


def processor(folder: Path) -> Any:
    """Tokenizer and image processor of a LLaVA, the latter on Pillow."""
    from transformers import AutoProcessor

    with reading(f"{folder} has no processor that can be loaded"):
        _check(folder)
        found = AutoProcessor.from_pretrained(folder, backend="pil", **_LOCAL)
        if type(found).__name__ != "LlavaProcessor":
            raise ValueError(f"a {type(found).__name__}; a LLaVA has a LlavaProcessor")
        for part in ("tokenizer", "image_processor"):
            if getattr(found, part, None) is None:
                raise ValueError(f"a LlavaProcessor without {part.replace('_', ' ')}")
        return found


def _check(folder: Path) -> None:
    """What transformers takes on trust."""
    if (folder / "adapter_config.json").exists():
        raise ValueError("it is an adapter, which names another model: merge the two and save the result")
    for name in _OBJECTS:
        if (folder / name).is_file():
            found = _read(folder / name)
            if not isinstance(found, dict):
                raise ValueError(f"{name} holds a {type(found).__name__}, expected a JSON object")
            if name == "config.json":
                _check_config(found)
            if name == _INDEX:
                _check_index(found)


def _read(path: Path) -> Any:
    if path.stat().st_size > LONGEST_JSON:
        raise ValueError(f"{path.name} has more than {LONGEST_JSON >> 20} MiB")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from None


def _check_config(found: dict[str, Any]) -> None:
    """Sizes that no model has, and the names of kernels that transformers would fetch and run."""
    for key, value in found.items():
        if isinstance(value, dict):
            _check_config(value)
        elif key in _SIZES and value is not None:
            _check_size(key, value)
        elif key.lstrip("_") in _CODE and "/" in str(value):
            raise ValueError(f"{key}={value} in config.json names code from elsewhere; take the line out")


def _check_index(found: dict[str, Any]) -> None:
    """The files that hold the weights: of this folder, and no others."""
    weights = found.get("weight_map")
    for file in weights.values() if isinstance(weights, dict) else [weights]:
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{_INDEX} names {file!r}: expected the name of a file beside it")


def _check_size(key: str, value: Any) -> None:
    values = value if isinstance(value, list) else [value]
    if any(not isinstance(one, int) or isinstance(one, bool) or one < 1 for one in values):
        raise ValueError(f"{key}={value!r} in config.json: expected a whole number above 0")
    if key == "num_hidden_layers" and max(values, default=1) > LAYERS:
        raise ValueError(f"{key}={value} in config.json: more than {LAYERS:,} layers")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}"
