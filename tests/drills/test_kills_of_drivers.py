"""As `test_kills.py`, for what takes the command down: a module of its own, so that another process may run it."""

from pathlib import Path

import pytest

from tests.drills.test_kills import assert_nothing_was_lost, finetuned, kill_cluster, kill_driver, prepared


def test_a_driver_and_a_cluster_cost_nothing_but_time(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reference = finetuned(tmp_path_factory)
    drill = prepared(reference, tmp_path / "root")
    try:
        for kill_it in (kill_driver, kill_cluster):
            drill.start()
            drill.next_checkpoint("finetune")
            kill_it(drill)
        drill.finish()
    finally:
        drill.close()
    told = drill.log.read_text()
    assert told.count("resuming after step") == 2, told
    assert_nothing_was_lost(drill, reference)
