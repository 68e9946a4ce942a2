"""The benchmark of checkpoints: in its smallest form it measures a rank's life and puts its figures on a page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.at_scale import projection
from tests.support.repository import REPOSITORY

pytestmark = pytest.mark.slow
RATES = projection.Rates(disk=2.0, network=1.25, host=20.0, link=50.0, sha=1.0, per_node=8)


@pytest.mark.drill
def test_the_command_measures_every_phase_and_writes_page_and_figures(tmp_path: Path) -> None:
    options = ["--parameters", "2e6", "--ranks", "2", "--zero", "2", "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "benchmarks/checkpoints.py", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "checkpoints.json").read_text())
    page = (tmp_path / "checkpoints.md").read_text()
    (row,) = report["summary"]
    assert (row["side"], row["zero"], row["ranks"]) == ("after", 2, 2)
    assert row["state"] >= 12 * report["model"]["trainable"]
    for phase in ("load", "engine", "save", "resume", "export"):
        assert row[phase]["seconds"] > 0
        assert row[phase]["cpu_seconds"] > 0
        assert row[phase]["anonymous_max"] >= row[phase]["anonymous_median"] >= 0
    # Each rank copies its half of the state to save it; some of that lies in memory that was freed before.
    assert row["save"]["anonymous_max"] > row["state"] / 2 * 0.5
    assert 0 < row["held"] <= row["save"]["seconds"]
    assert f"| 2 | 2 | after | {row['held']:.2f} | {row['save']['seconds']:.2f} |" in page
    assert report["command"] in page
    for (figure, _), formula in projection.FORMULAS.items():
        assert figure in page
        assert formula in page


def test_a_share_shrinks_with_the_ranks_and_the_state_on_one_rank_does_not() -> None:
    few, many = (projection.row("7B", ranks, RATES)["figures"] for ranks in (8, 64))
    assert few["save, rank"]["after"] == 8 * many["save, rank"]["after"]
    assert few["save, rank"]["before"] == many["save, rank"]["before"] == 12 * 6_759_395_328
    assert many["save, node"]["after"] == few["save, rank"]["before"] / 8
    assert few["save, committed"]["after"] > many["save, committed"]["after"]


def test_a_save_takes_as_long_as_its_formula_says() -> None:
    found = projection.row("7B", 8, RATES)["figures"]["save, committed"]
    state = 12 * 6_759_395_328 / 1e9
    assert found["before"] == pytest.approx(state * (1 / 50 + 1 / 20 + 1 / 2 + 1 / 1.25))
    assert found["after"] == pytest.approx(state * (1 / 8 / 20 + 1 / 2 + 1 / 8 / 1 + 1 / 1.25))
