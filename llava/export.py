"""A model as a folder in the form of the hub's LLaVAs (llava-hf), whichever door it came through.

Current transformers writes names of weights that depend on how a model was loaded, and leaves out `vision_model.`,
which transformers 4 and vLLM need. It names a tokenizer class and writes keys that older ones do not know. What is
written here is read alike by transformers 4.57 and by the newest (`make drills` tries it).
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llava.towers import family_of

_INDEX = "model.safetensors.index.json"
_LARGEST = "4GB"
_BLOCK = 16 << 20
_OF_A_MACHINE = ("_name_or_path", "name_or_path", "is_local", "local_files_only", "tokenizer_file")
"""Where a part was once loaded from: of no use to others, and not theirs to know."""
_FAST = "PreTrainedTokenizerFast"
"""The class that reads `tokenizer.json` as it is, under a name that all versions know."""


def write(model: Any, processor: Any, folder: Path) -> None:
    """Weights, configs, tokenizer and image processor."""
    prefix = family_of(model.config.vision_config.model_type).hub_prefix
    model.save_pretrained(folder, max_shard_size=_LARGEST)
    _rename_weights(folder, lambda name: hub_name(name, prefix))
    _write_texts(processor, folder)


def write_around(model: Any, dtype: torch.dtype, processor: Any, folder: Path) -> None:
    """What `write` writes beside the weights, where these are in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _write_texts(processor, folder)


def file_name(number: int, count: int) -> str:
    """Of file `number` (the first is 1) of `count`."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, weight_map: dict[str, str], total: int) -> None:
    """Say which weight lies in which file; `total` bytes of weights."""
    body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / _INDEX).write_text(json.dumps(body, indent=2) + "\n")


def _write_texts(processor: Any, folder: Path) -> None:
    processor.save_pretrained(folder)
    _edit(folder / "config.json", _with_both_ropes)
    _edit(folder / "generation_config.json", _anywhere)
    _edit(folder / "tokenizer_config.json", _tokenizer_of_all_versions)
    _split_image_processor(folder)


def hub_name(name: str, tower_prefix: str) -> str:
    """The name of a weight as llava-hf has it. `tower_prefix`: what its tower's names begin with."""
    for pattern, new in (
        (r"^(model\.)?vision_tower\.", "vision_tower."),
        (r"^(model\.)?multi_modal_projector\.", "multi_modal_projector."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^(model\.)?lm_head\.", "language_model.lm_head."),
    ):
        name = re.sub(pattern, new, name)
    tower = f"vision_tower.{tower_prefix}"
    if name.startswith("vision_tower.") and not name.startswith(tower):
        return tower + name.removeprefix("vision_tower.")
    return name


def _rename_weights(folder: Path, rename: Callable[[str], str]) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        _rename_in(path, rename)
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text())
        index["weight_map"] = {rename(name): file for name, file in sorted(index["weight_map"].items())}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _rename_in(path: Path, rename: Callable[[str], str]) -> None:
    """A safetensors file is a table of names and then the numbers, which are copied as they are."""
    with path.open("rb") as old:
        table = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        named = {name if name == "__metadata__" else rename(name): entry for name, entry in table.items()}
        if list(named) == list(table):
            return
        if len(named) < len(table):
            raise AssertionError(f"{path}: two weights would get one name")
        header = json.dumps(named, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        target = path.with_name(f"{path.name}.renamed")
        with target.open("wb") as new:
            new.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(old, new, _BLOCK)
    target.chmod(path.stat().st_mode)
    target.replace(path)


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if path.is_file():
        path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2, ensure_ascii=False) + "\n")


def _anywhere(found: Any) -> Any:
    """Without what says on which machine it was made."""
    if isinstance(found, dict):
        return {key: _anywhere(value) for key, value in found.items() if key not in _OF_A_MACHINE}
    return [_anywhere(one) for one in found] if isinstance(found, list) else found


def _with_both_ropes(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 4 reads `rope_theta` and `rope_scaling`, and takes its own default where they are missing."""
    config = _anywhere(config)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        rope = part.get("rope_parameters")
        if not isinstance(rope, dict) or "rope_theta" not in rope:
            continue
        scaling = {
            key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")
        }
        part["rope_theta"] = rope["rope_theta"]
        part["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        if "partial_rotary_factor" in rope:
            part["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return config


def _tokenizer_of_all_versions(config: dict[str, Any]) -> dict[str, Any]:
    """A class that all versions have, and the further special tokens under the key that all of them read."""
    config = _anywhere(config)
    config.pop("backend", None)
    config["tokenizer_class"] = _FAST
    if isinstance(config.get("extra_special_tokens"), list):
        extra = config.pop("extra_special_tokens")
        config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *extra]
    return config


def _split_image_processor(folder: Path) -> None:
    """What is done to images is in a file of its own, where transformers 4 looks, and nowhere else."""
    path = folder / "processor_config.json"
    found = _anywhere(json.loads(path.read_text()))
    images = found.pop("image_processor", None)
    path.write_text(json.dumps(found, indent=2) + "\n")
    if images is not None:
        images = {**images, "processor_class": found["processor_class"]}
        (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
