"""Checkpoints of a training: the marker, the position, the history and the tensors, each changed as it lies there."""

from __future__ import annotations

import contextlib
from pathlib import Path
from random import Random

import torch

from components.contract import acquire, open_store
from components.training.checkpoints import COMMITTED, Checkpoint, CheckpointFolders, Damaged, Saver
from llava.data.jsonl import from_json
from llava.training import checkpoint as files
from llava.training.checkpoint import PARTS, Fragment
from tests.support.fuzz_kinds.kind import Kind, Readers
from tests.support.fuzzing import like_bytes, like_json

_NAMES = ("model.multi_modal_projector.linear_1.weight", "lm_head.weight")


def checkpoints(place: Path) -> Kind:
    folder = open_store(place / "root").sub("finetune/0123")
    with acquire(folder) as lease:
        saver = Saver(CheckpointFolders(folder, lease.guard, 2), 0, 1, "aaaaaaaa", place)
        pieces = [Fragment(name, 0, dict.fromkeys(PARTS, torch.arange(12.0))) for name in _NAMES]
        position = files.position_json(files.Position(3, {"seed": 1, "parts": ["projector"]}, 3))
        there = saver.save(3, pieces, {files.STATE: position})
        saver.wait()
        saver.close()
    seeds = {name: there.read(name) for name in (COMMITTED, files.STATE, files.file_of("weights", 0, 1))}

    def inputs(chance: Random) -> tuple[str, bytes]:
        name = chance.choice(list(seeds))
        if name.endswith(".safetensors") or chance.random() < 0.2:
            return name, like_bytes(chance, seeds[name])
        return name, like_json(chance, from_json(seeds[name]))

    def readers(found: tuple[str, bytes]) -> Readers:
        for name, data in seeds.items():
            there.write(name, data)
        there.write(*found)

        def checked() -> None:
            Checkpoint(there).check(0, 1)

        def read() -> None:
            """As if the sizes and hashes were right: whoever writes a marker can write that, too."""
            with contextlib.suppress(Damaged):
                checkpoint = Checkpoint(there)
                where = checkpoint.position({"seed": 1, "parts": ["projector"]})
                with contextlib.closing(checkpoint.state(where)) as state:
                    for name in sorted(state.names)[:4]:
                        state.read("weights", name, 0, 12)

        return [checked, read]

    return inputs, readers
