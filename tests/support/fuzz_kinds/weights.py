"""Folders of models: configs, tables of weights, and the weights themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from components.backbones.sources import as_safetensors
from llava import generate
from llava import model as models
from tests.support.fuzz_kinds.kind import Kind, Readers
from tests.support.fuzzing import like_bytes, like_json
from tests.support.tiny_llava import tiny_llava


def model_folders(place: Path) -> Kind:
    folder = tiny_llava(place / "model")
    names = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
             "generation_config.json")  # fmt: skip
    whole = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}

    def inputs(chance: Random) -> tuple[str, bytes]:
        name = chance.choice(list(whole))
        return name, like_json(chance, json.loads(whole[name]))

    def readers(found: tuple[str, bytes]) -> Readers:
        for name, data in whole.items():
            (folder / name).write_bytes(data)
        (folder / found[0]).write_bytes(found[1])
        return [lambda: models.load_config(folder), lambda: models.load_processor(folder)]

    return inputs, readers


def weight_files(place: Path) -> Kind:
    """Safetensors in one file and in two with an index, whose tables and bytes are changed; pickles, too."""
    whole = tiny_llava(place / "model")
    (weights,) = whole.glob("*.safetensors")
    split, pickled = place / "split", place / "pickled"
    for folder in (split, pickled):
        shutil.copytree(whole, folder)
        (folder / weights.name).unlink()
    model = models.load(whole, torch.float32)
    model.save_pretrained(split, max_shard_size="200KB")
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    index = next(split.glob("*.index.json")).name
    seeds = {
        path: path.read_bytes()
        for folder, pattern in (
            (whole, "*.safetensors"),
            (split, "*.safetensors"),
            (split, index),
            (pickled, "*.bin"),
        )
        for path in sorted(folder.glob(pattern))
    }

    def inputs(chance: Random) -> tuple[Path, bytes]:
        path = chance.choice(list(seeds))
        return path, _like_weights(chance, path, seeds[path])

    def readers(found: tuple[Path, bytes]) -> Readers:
        path, data = found

        def hurt(read: Callable[[Path], object]) -> Callable[[], None]:
            def done() -> None:
                path.write_bytes(data)
                try:
                    read(path.parent)
                finally:
                    path.write_bytes(seeds[path])

            return done

        if path.parent == pickled:
            return [hurt(converted)]
        return [hurt(tried)]

    def converted(folder: Path) -> None:
        scratch = place / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        as_safetensors(folder, scratch, lambda _: None)

    def tried(folder: Path) -> None:
        loaded = models.load(folder, torch.float32)
        generate.try_out(folder, loaded, models.load_processor(folder), "chatml")

    return inputs, readers


def _like_weights(chance: Random, path: Path, data: bytes) -> bytes:
    if path.suffix == ".json":
        return like_json(chance, json.loads(data))
    if path.suffix != ".safetensors" or chance.random() < 0.4:
        return like_bytes(chance, data)
    length = int.from_bytes(data[:8], "little")
    table: dict[str, Any] = json.loads(data[8 : 8 + length])
    header = like_json(chance, table)
    said = len(header) if chance.random() < 0.9 else chance.choice((0, 1, length, 2**31, 2**63, 2**64 - 1))
    return said.to_bytes(8, "little") + header + data[8 + length :]
