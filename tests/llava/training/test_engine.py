"""The optimizer's groups, beside those of the Trainer of transformers."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from llava import model as models
from llava.training.engine import AdamW, trainable
from tests.support.tiny_llava import tiny_llava


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.nn.Parameter]:
    folder = tiny_llava(tmp_path_factory.mktemp("model"))
    return dict(models.load(folder, torch.float32).named_parameters())


def test_weight_decay_takes_what_the_trainer_of_transformers_decays(tmp_path: Path) -> None:
    stock = models.load(tiny_llava(tmp_path / "model"), torch.float32)
    theirs = Trainer(stock, TrainingArguments(str(tmp_path), use_cpu=True)).get_decay_parameter_names(stock)
    models.set_trainable(stock, ["projector", "language_model"])
    named = trainable(stock)
    groups = AdamW(weight_decay=0.1).build(named).param_groups
    decayed = {id(one) for group in groups if group["weight_decay"] for one in group["params"]}
    ours = {name for name, parameter in named.items() if id(parameter) in decayed}
    assert ours == set(theirs) & set(named)
    assert {"bias", "weight"} == {name.rpartition(".")[2] for name in set(named) - ours}


def test_without_decay_there_is_one_group_per_rate(named: dict[str, torch.nn.Parameter]) -> None:
    assert len(AdamW().build(named).param_groups) == 1
    groups = (
        AdamW(weight_decay=0.1, scales=(("model.multi_modal_projector.", 0.1),)).build(named).param_groups
    )
    kinds = {(group["scale"], group["weight_decay"]) for group in groups}
    assert kinds == {(1.0, 0.1), (1.0, 0.0), (0.1, 0.1), (0.1, 0.0)}
    assert sum(len(group["params"]) for group in groups) == len(named)
