"""`make drills`: what takes too long for every run of the tests. The figures are printed."""

import random
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.contract import open_artifact
from tests.support.command import LLAVA, environment
from tests.support.whole_run import SMALL, Run, llava

pytestmark = pytest.mark.drill


def test_three_seeds_all_see_the_picture(tmp_path: Path) -> None:
    right = []
    for seed in range(3):
        seeds = [
            f"{stage}.seed={seed}" for stage in ("backbones", "shard", "instruct", "pretrain", "finetune")
        ]
        run = llava("train", "tiny", *[part for each in seeds for part in ("--set", each)], cwd=tmp_path)
        assert run.status == 0, run.err
        scores = run.summary["scores"]
        found = [scores[f"eval/vqa/{name}"] for name in ("exact_match", "blank_image", "wrong_image")]
        print(f"seed {seed}: right {found[0]:.1f} %, blank {found[1]:.1f} %, wrong {found[2]:.1f} %")
        right.append(found[0])
        assert found[0] > 70
        assert found[0] - found[1] >= 30
        assert found[0] - found[2] >= 30
        if seed == 0:
            asked_as_printed(run, tmp_path)
    print(f"mean {statistics.mean(right):.1f} %")
    assert statistics.mean(right) > 80


def asked_as_printed(run: Run, folder: Path) -> None:
    """`llava ask` about the held-out picture that the run names: the right answer, by artifact and by alias."""
    example = open_artifact(run.summary["artifacts"]["evaluate"]).manifest.notes["example"]
    picture = Path(run.summary["artifacts"]["evaluate"]) / example["picture"]
    for model in (run.summary["artifacts"]["finetune"], "models:/llava-tiny@champion"):
        done = subprocess.run(
            [*LLAVA, "ask", "--model", model, "--image", str(picture), example["question"]],
            cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        print(f"{example['question']} {done.stdout.strip()}")
        assert done.stdout.strip() == example["expected"]


SETTINGS = ["train", "tiny", *SMALL, "--set", "finetune.checkpoint_every=5"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = llava(*SETTINGS, cwd=tmp_path_factory.mktemp("undisturbed"))
    assert run.status == 0, run.err
    return run


@pytest.mark.parametrize("round_", range(10))
def test_a_driver_killed_at_a_random_moment_changes_nothing(
    undisturbed: Run, tmp_path: Path, round_: int
) -> None:
    """kill -9 of the whole command, wherever it is: shard, instruct, either stage, evaluation."""
    length = sum(undisturbed.summary["seconds"].values())
    driver = subprocess.Popen([*LLAVA, *SETTINGS], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE)
    moment = random.uniform(5, length)
    try:
        driver.wait(moment)
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.wait(30)
    done = sorted(path.parts[-3] for path in tmp_path.glob("runs/*/*/manifest.json"))
    print(f"round {round_}: killed after {moment:.1f} s of about {length:.0f} s; finished: {', '.join(done)}")
    resumed = llava(*SETTINGS, cwd=tmp_path)
    assert resumed.status == 0, resumed.err
    assert sorted(resumed.summary["reused"]) == done
    ours, theirs = (
        load_file(Path(run.summary["artifacts"]["finetune"]) / "model" / "model.safetensors")
        for run in (resumed, undisturbed)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert str(resumed.summary["model"]["version"]) == "1"
    assert resumed.summary["scores"] == undisturbed.summary["scores"]
