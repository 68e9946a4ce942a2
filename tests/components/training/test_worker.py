"""What a worker builds from its task, without Ray."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyarrow import fs

from components.finetune import FinetuneSettings
from components.training import worker
from llava.data.reader import ParquetRows
from llava.data.samples import VIEWS
from tests.support.mixed_batches import pieces, write_mixed
from tests.support.tiny_llava import tiny_llava


@pytest.mark.parametrize("lora", [False, True])
def test_in_half_precision_the_frequencies_of_positions_stay_whole(
    lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny_llava(tmp_path / "model"), write_mixed(tmp_path / "data.parquet", 24)
    made = pieces(model, data, 2, 1000)
    made.plan.index.save(tmp_path / "index")
    rows = ParquetRows(fs.LocalFileSystem(), [str(data)], VIEWS["conversations"][1])
    monkeypatch.setattr(worker, "open_all", lambda sources, view: rows)
    monkeypatch.setattr(worker, "source_of", lambda dataset: None)
    monkeypatch.setattr(worker, "DeepSpeedEngine", lambda module, *given: SimpleNamespace(module=module))
    settings = FinetuneSettings(
        template="chatml", global_batch=8, zero_stage=1, workers=1, precision="bf16", lora=lora
    )
    task: Any = SimpleNamespace(
        settings=settings,
        training="lora" if lora else "full",
        parts=("projector", "language_model"),
        view="conversations",
        model=SimpleNamespace(local=lambda name: model, digest="model"),
        dataset=SimpleNamespace(digest="dataset"),
        extra=(),
        folder=SimpleNamespace(download=lambda name, to: shutil.copy(tmp_path / "index", to)),
        deepspeed={},
    )
    language = worker._Setup(task, tmp_path).engine.module.stock.model.language_model
    assert {parameter.dtype for parameter in language.parameters()} == {torch.bfloat16}
    assert language.rotary_emb.inv_freq.dtype == torch.float32
