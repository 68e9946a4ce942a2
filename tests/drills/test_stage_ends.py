"""The end of a stage is its weakest moment: everything is computed and nothing is finished.

Real processes die in the last checkpoint, in the export, and before the manifest; a disk is full in the middle of a
save; bits of a checkpoint flip. Each time the same command ends with the bits of a run that nobody disturbed.
"""

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drills.test_kills import BEFORE, QUICK, Drill, assert_nothing_was_lost, prepared
from tests.support.dying import dying_at, happened
from tests.support.whole_run import SHARED, trained

COMMIT = "components.training.checkpoints:Saver._commit"
PUT = "components.training.model_files:ModelFiles._put"
REST = "components.training.model_files:ModelFiles.store_rest"
MANIFEST = "components.contract.runner:_commit"


@pytest.fixture
def drill(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    """Stage 2 of the run that all tests share, with no checkpoint but the one after its last step."""
    found = prepared(shared(tmp_path_factory), tmp_path / "root", (*BEFORE, "pretrain"))
    found.arguments = ["finetune", "tiny", *SHARED, "--set", "finetune.checkpoint_every=100000"]
    try:
        yield found
    finally:
        found.close()


def shared(factory: pytest.TempPathFactory) -> Drill:
    return Drill(trained(factory)[0] / "runs", {"finetune": 3})


@pytest.mark.parametrize(
    "places",
    [(PUT, MANIFEST), pytest.param((COMMIT, REST, MANIFEST), marks=pytest.mark.drill)],
    ids=["export", "last-checkpoint"],
)
def test_who_dies_at_the_end_of_a_stage_costs_no_step_that_is_saved(
    drill: Drill, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, places: tuple[str, ...]
) -> None:
    drill.environment = QUICK | dying_at(tmp_path / "dying", *places)
    drill.start()
    assert drill.wait() == -signal.SIGKILL, drill.log.read_text()
    assert all(happened(tmp_path / "dying", place) for place in places)
    told = drill.log.read_text()
    steps = len(shared(tmp_path_factory).artifact("finetune").folder.read("history.jsonl").splitlines())
    # Who died in the last checkpoint took the only one along; a death after it cost no step.
    assert told.count(f"resuming after step {steps} of {steps}") == 1, told
    assert told.count("resuming after step") == 1, told
    drill.close()
    drill.finish()
    told = drill.log.read_text()
    assert told.count(f"resuming after step {steps} of {steps}") == 2, told
    assert_nothing_was_lost(drill, shared(tmp_path_factory))


@pytest.mark.drill
def test_a_sigterm_during_the_export_ends_at_once_and_costs_no_step(
    drill: Drill, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    drill.environment = QUICK | dying_at(tmp_path / "waiting", REST, waits=45.0)
    drill.start()
    while not happened(tmp_path / "waiting", REST):
        assert drill.driver is not None and drill.driver.poll() is None, drill.log.read_text()
        time.sleep(0.05)
    began = time.monotonic()
    drill.driver.send_signal(signal.SIGTERM)
    assert drill.wait() == 4, drill.log.read_text()
    assert time.monotonic() - began < 30
    assert "saved after step" in drill.log.read_text()
    drill.finish()
    assert_nothing_was_lost(drill, shared(tmp_path_factory))


@pytest.mark.drill
def test_bits_that_flip_in_a_checkpoint_are_found_and_the_one_before_is_taken(
    drill: Drill, tmp_path_factory: pytest.TempPathFactory
) -> None:
    drill.arguments = [*drill.arguments, "--set", "finetune.checkpoint_every=2"]
    drill.start()
    for _ in range(2):
        drill.next_checkpoint("finetune")
    assert drill.driver is not None
    drill.driver.send_signal(signal.SIGTERM)
    assert drill.wait() == 4, drill.log.read_text()
    newest = max(
        drill.root.glob("finetune/*/**/checkpoints/*/COMMITTED"), key=lambda path: path.parent.name
    ).parent
    file = sorted(newest.glob("exp_avg-*"))[-1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    data[-5] ^= 16
    file.write_bytes(data)
    drill.finish()
    told = drill.log.read_text()
    assert f"{newest.name} is damaged ({file.name} has other contents than were committed)" in told, told
    assert "going on from the one before" in told
    assert_nothing_was_lost(drill, shared(tmp_path_factory))


@pytest.mark.drill
def test_a_disk_that_is_full_in_the_middle_of_a_save_costs_nothing_but_time(
    drill: Drill, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    drill.arguments = [*drill.arguments, "--set", "finetune.checkpoint_every=4"]
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        subprocess.run(["cp", "-a", str(drill.root), str(disk / "root")], check=True)
        drill.root = disk / "root"
        drill.start()
        drill.next_checkpoint("finetune")
        ballast = disk / "ballast"
        with ballast.open("wb") as file:
            try:
                while file.write(bytes(1 << 16)):
                    file.flush()
            except OSError:
                pass
        assert drill.wait() == 1, drill.log.read_text()
        told = drill.log.read_text()
        assert "No space left on device" in told and "Traceback" not in told, told
        assert {path.parent for path in drill.root.glob("finetune/*/**/checkpoints/0*/*")} == {
            path.parent for path in drill.root.glob("finetune/*/**/checkpoints/*/COMMITTED")
        }
        ballast.unlink()
        drill.finish()
        assert "resuming after step" in drill.log.read_text()
        assert_nothing_was_lost(drill, shared(tmp_path_factory))
    finally:
        drill.close()
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
