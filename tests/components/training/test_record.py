"""What a run leaves behind: metrics once, figures only where they are known."""

import pytest

from components.contract import Tracking
from components.training.record import Entry, MetricLog
from components.training.utilisation import Utilisation, peak_tflops
from llava.sizes import CLIP_L14_336, VICUNA_7B, Sizes


def history(first: int, last: int, at: float) -> list[Entry]:
    """Lines of steps `first` to `last`, computed around the time `at`."""
    return [
        {"step": step, "train/loss": 1 / step, "train/fill": 0.9, "at": at + step}
        for step in range(first, last + 1)
    ]


@pytest.mark.parametrize("logged_before_the_kill", [0, 3, 5, 8])
def test_a_step_is_logged_once_wherever_a_kill_cut_in(mlflow_db: str, logged_before_the_kill: int) -> None:
    """A checkpoint after step 5, a kill after step 8; the resumed run computes 6 to 8 again, and goes on."""
    run = Tracking(mlflow_db, "record").start("finetune")
    before = history(1, 8, at=1000.0)
    MetricLog(run).send(before[:logged_before_the_kill])
    resumed = MetricLog(run)
    again = before[:5] + history(6, 9, at=2000.0)
    resumed.send(again)
    resumed.send(again + history(10, 12, at=2000.0))
    for name in ("train/loss", "train/fill"):
        found = run._client.get_metric_history(run.id, name)
        assert sorted(metric.step for metric in found) == list(range(1, 13))


def test_a_step_of_which_only_some_metrics_arrived_is_completed(mlflow_db: str) -> None:
    run = Tracking(mlflow_db, "record").start("finetune")
    run.metric_rows([("train/loss", 0.5, 2, 1000)])
    MetricLog(run).send(history(1, 3, at=1000.0))
    assert (run.steps("train/loss"), run.steps("train/fill")) == ({1, 2, 3}, {1, 2, 3})
    assert len(run._client.get_metric_history(run.id, "train/loss")) == 3


def test_metrics_wait_while_mlflow_is_away(mlflow_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_OUTAGE_SECONDS", "0")
    run = Tracking(mlflow_db, "record").start("finetune")
    away, run.uri = run.uri, "http://127.0.0.1:9"
    log = MetricLog(run)
    log.send(history(1, 2, at=1000.0))
    run.uri = away
    log.send(history(1, 4, at=1000.0))
    assert run.steps("train/loss") == {1, 2, 3, 4}


def test_mfu_counts_six_operations_per_weight_and_token_where_the_language_model_learns() -> None:
    sizes = Sizes(CLIP_L14_336, VICUNA_7B)
    weights, head = VICUNA_7B.token_weights, VICUNA_7B.hidden * VICUNA_7B.vocabulary
    full = Utilisation(sizes, "full", 0, tflops=989)
    peak = 2.0 * 8 * 989e12
    assert full.mfu(8192, 1000, 2.0, 8) == pytest.approx(6 * (weights * 8192 + head * 1000) / peak)
    frozen = Utilisation(sizes, "frozen", 0, tflops=989)
    assert frozen.mfu(8192, 0, 2.0, 8) == pytest.approx(4 * weights * 8192 / peak)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA H100 PCIe", None),
        ("Tesla T4", None),
    ],
)
def test_a_devices_peak_is_known_by_its_name_or_not_at_all(name: str, tflops: float | None) -> None:
    assert peak_tflops(name) == tflops
