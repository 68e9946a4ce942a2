"""The last lines of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.backbones.component import Backbones, BackbonesSettings
from components.contract import Tracking, Workspace, open_store, run_component
from workflows import summary
from workflows.train import Summary

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_they_say_how_vllm_reads_a_single_linear_layer(
    projector: str, mlflow_db: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = Workspace(
        open_store(tmp_path / "root"), Tracking(mlflow_db, "summary", str(tmp_path / "mlflow"))
    )
    outcome = run_component(Backbones(), BackbonesSettings(projector=projector), {}, workspace)
    told = Summary()
    told.add("pretrain", outcome)
    summary.show(told, workspace)
    line = """--hf-overrides '{"projector_hidden_act": "torch.nn.modules.linear.Identity"}'"""
    assert (line in capsys.readouterr().err) == (projector == "linear")
