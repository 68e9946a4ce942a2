"""The benchmark of many ranks: what it asserts of four of them, and that its page has its figures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ranks
from tests.support.repository import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.drill]
SMALL = (
    "--ranks 4 --steps 15 --slow-steps 4 --samples 20000 --global-batch 32 --step-seconds 0.005 --primitives 3 "
    "--plan-ranks 8 --plan-steps 2"
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The figures and the page."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "benchmarks/ranks.py", *SMALL.split(), "--out", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "ranks.json").read_text()), (folder / "ranks.md").read_text()


def test_rank_0_does_little_more_in_a_step_than_the_others(written: tuple[dict[str, Any], str]) -> None:
    (row,) = written[0]["ranks"]
    found = row["bookkeeping"]
    assert found["others"] > 0
    assert found["rank 0"] - found["others"] == pytest.approx(found["extra"])
    assert found["extra"] < ranks.BOUND


def test_a_late_rank_delays_the_step_by_no_less_than_it_is_late(
    written: tuple[dict[str, Any], str],
) -> None:
    (row,) = written[0]["ranks"]
    assert row["slow step"] >= 0.05


def test_a_step_has_one_collective_that_grows_with_nothing(written: tuple[dict[str, Any], str]) -> None:
    (row,) = written[0]["ranks"]
    assert row["step collectives"]["all_reduce"] == {"calls": 1.0, "bytes": 40.0}
    assert row["store keys"]["joined"] == row["store keys"]["at the end"]


@pytest.mark.parametrize("where", ["step", "save"])
def test_after_a_kill_all_ranks_leave_long_before_the_timeout_and_nothing_is_committed(
    written: tuple[dict[str, Any], str], where: str
) -> None:
    (row,) = written[0]["ranks"]
    found = row[f"killed in a {where}"]
    assert 0 < found["noticed"][0] <= found["left"] < 30
    assert found["committed"] == 0
    assert found["errors"]
    # Whoever goes on next has deleted what was begun.
    assert row["unfinished left"] == 0


def test_half_the_ranks_go_on_from_the_checkpoint(written: tuple[dict[str, Any], str]) -> None:
    (row,) = written[0]["ranks"]
    assert row["resume on half"]["ranks"] == 2


def test_the_page_has_the_figures(written: tuple[dict[str, Any], str]) -> None:
    report, page = written
    (row,) = report["ranks"]
    assert report["command"] in page
    assert f"**{row['bookkeeping']['extra'] * 1e3:,.2f}**" in page
    assert f"{row['commit']['last share to marker']:.2f}" in page
    for one in report["growth"]:
        assert f"| {one['figure']} | {one['values'][0]:.3g} |" in page


def test_a_resume_gathers_nothing_of_all_ranks_on_each(written: tuple[dict[str, Any], str]) -> None:
    (row,) = written[0]["ranks"]
    for found in (row["resume"], row["resume on half"]):
        assert "all_gather_object" not in found["collectives"]
        assert found["collectives"]
