"""The whole way of the data on real parts: a small run, run again, asked, killed, on S3, as a Ray job."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from components.contract import open_artifact
from components.registry import Registry
from components.tiny_world import scenes
from llava.errors import RefusedInput
from tests.support.command import LLAVA, environment
from tests.support.whole_run import SHARED, Run, llava, trained
from workflows import config as configs
from workflows import train
from workflows.ask import answer
from workflows.show import show

ALONE = [part for stage in ("pretrain", "finetune", "evaluate") for part in ("--set", f"{stage}.workers=1")]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A folder in which `llava train tiny`, made smaller, ran once."""
    return trained(tmp_path_factory)


def test_the_summary_names_artifacts_scores_and_the_version(first: tuple[Path, Run]) -> None:
    _, run = first
    stages = ["backbones", "shard", "instruct", "pretrain", "finetune", "evaluate", "register"]
    assert list(run.summary["artifacts"]) == stages
    assert set(run.summary["seconds"]) == set(stages)
    assert run.summary["reused"] == []
    for name in ("eval/vqa/exact_match", "eval/vqa/blank_image", "eval/vqa/wrong_image"):
        assert 0 <= run.summary["scores"][name] <= 100
    assert run.summary["model"]["name"] == "llava-tiny"
    assert (str(run.summary["model"]["version"]), run.summary["model"]["alias"]) == ("1", "champion")


def test_the_same_command_again_finds_everything_and_registers_nothing(first: tuple[Path, Run]) -> None:
    folder, run = first
    again = llava("train", "tiny", *SHARED, cwd=folder)
    assert again.status == 0, again.err
    assert again.summary["reused"] == list(run.summary["artifacts"])
    assert again.summary["artifacts"] == run.summary["artifacts"]
    assert again.summary["model"] == run.summary["model"]
    registry = Registry(f"sqlite:///{folder}/runs/mlflow.db")
    assert registry.by_version("llava-tiny", "2") is None


def test_runs_that_trained_and_runs_that_found_show_the_same_curves(first: tuple[Path, Run]) -> None:
    folder, run = first
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    found = client.search_runs(["1"], "tags.workflow = 'train' and attributes.status = 'FINISHED'")
    assert len(found) == 2
    for stage in ("pretrain", "finetune"):
        history = open_artifact(run.summary["artifacts"][stage]).folder.read("history.jsonl")
        losses = [(line["step"], line["train/loss"]) for line in map(json.loads, history.splitlines())]
        for each in found:
            logged = client.get_metric_history(each.info.run_id, f"{stage}/loss")
            assert sorted((point.step, point.value) for point in logged) == losses


def test_stock_transformers_gives_the_same_logits_and_the_same_answer(
    first: tuple[Path, Run], tmp_path: Path
) -> None:
    _, run = first
    from llava import generate
    from llava.conversation import Encoder
    from llava.model import LlavaForTraining, image_tokens
    from llava.pixels import Pixels

    model_folder = Path(run.summary["artifacts"]["finetune"]) / "model"
    scene = next(scenes(1, 1, "heldout"))
    (tmp_path / "scene.png").write_bytes(scene.png)
    image = Image.open(tmp_path / "scene.png").convert("RGB")
    stock = LlavaForConditionalGeneration.from_pretrained(model_folder)
    processor = AutoProcessor.from_pretrained(model_folder, backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": "How many objects are there?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    with torch.no_grad():
        written = stock.generate(**inputs, max_new_tokens=8, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        logits = stock(**inputs).logits[0]
    theirs = processor.tokenizer.decode(written, skip_special_tokens=True).strip()

    ours, own_processor = generate.load(model_folder)
    assert generate.answer(ours, own_processor, ["How many objects are there?"], [image], 8) == [theirs]
    encoder = Encoder(own_processor.tokenizer, "chatml", image_tokens(ours.config))
    ids = encoder.prompt([{"from": "human", "value": "<image>\nHow many objects are there?"}], 1)
    assert ids == inputs["input_ids"][0].tolist()
    packed = packed_logits(
        LlavaForTraining(ours, Pixels(own_processor.image_processor)), ids, encoder.image_id, image
    )
    assert torch.allclose(packed, logits, atol=1e-5)


def packed_logits(module: Any, ids: list[int], image_id: int, image: Image.Image) -> torch.Tensor:
    """The training forward's logits at every position: two copies of the sample in one row, the second one's."""
    from llava.attention import segments

    inner, count = module.stock.model, len(ids)
    tokens = torch.tensor(ids * 2)
    pixels = torch.from_numpy(module.pixels(image))
    with torch.no_grad():
        features = inner.multi_modal_projector(module._patches(torch.stack([pixels, pixels])))
        embeds = inner.get_input_embeddings()(tokens)
        embeds = embeds.index_copy(0, (tokens == image_id).nonzero().squeeze(1), features.flatten(0, 1))
        hidden = inner.language_model(
            inputs_embeds=embeds[None],
            position_ids=torch.arange(count).repeat(2)[None],
            segments=segments([count, count]),
            use_cache=False,
        ).last_hidden_state[0]
        return module.stock.lm_head(hidden[count:])


def test_ask_gives_the_champions_answer(first: tuple[Path, Run], tmp_path: Path) -> None:
    folder, run = first
    scene, question = next(scenes(1, 1, "heldout")), "How many objects are there?"
    (tmp_path / "scene.png").write_bytes(scene.png)
    done = subprocess.run(
        [*LLAVA, "ask", "--model", "models:/llava-tiny@champion", "--image", str(tmp_path / "scene.png"), question],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trained = run.summary["artifacts"]["finetune"]
    assert done.stdout.strip() == answer(question, trained, tmp_path / "scene.png", "runs", 128, "cpu") != ""


def test_questions_about_one_picture_are_refused_before_training(
    first: tuple[Path, Run], tmp_path: Path, ray_local: str
) -> None:
    folder, _ = first
    shutil.copytree(folder / "runs", tmp_path / "runs")
    before = sorted(tmp_path.glob("runs/*/*/manifest.json"))
    config = configs.load("tiny", [*SHARED[1::2], "instruct.heldout_questions=1"])
    with pytest.raises(RefusedInput, match="its 1 held-out questions show one picture"):
        train.run(config, train.open_workspace(config.name, str(tmp_path / "runs")))
    made = set(tmp_path.glob("runs/*/*/manifest.json")) - set(before)
    assert [path.parts[-3] for path in made] == ["instruct"]


@pytest.mark.drill
def test_an_evaluation_whose_driver_is_killed_goes_on_with_the_batches_that_are_left(
    first: tuple[Path, Run], tmp_path: Path
) -> None:
    folder, run = first
    shutil.copytree(folder / "runs", tmp_path / "runs")
    finished = Path(run.summary["artifacts"]["evaluate"])
    (artifact,) = (tmp_path / "runs" / "evaluate").iterdir()
    shutil.rmtree(artifact)
    command = ["evaluate", "tiny", *SHARED, "--set", "evaluate.batch_size=4"]
    log = tmp_path / "log"
    with log.open("wb") as written:
        driver = subprocess.Popen([*LLAVA, *command], cwd=tmp_path, env=environment(), stderr=written)
    deadline = time.monotonic() + 200
    while not (batches := list(artifact.glob("checkpoints/answers/**/*.jsonl"))):
        assert driver.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    driver.kill()
    driver.wait(30)
    assert not (artifact / "manifest.json").exists()
    batches = list(artifact.glob("checkpoints/answers/**/*.jsonl"))
    assert batches
    answered = sum(len(batch.read_bytes().splitlines()) for batch in batches)
    again = llava(*command, cwd=tmp_path)
    assert again.status == 0, again.err
    assert f" {answered} of " in again.err, again.err
    answers = open_artifact(artifact).folder.read("answers.jsonl")
    assert answers == (finished / "answers.jsonl").read_bytes()
    ids = [json.loads(line)["id"] for line in answers.splitlines()]
    assert len(ids) == len(set(ids)) == run.summary["scores"]["eval/n"]


def test_prune_keeps_what_a_version_comes_from_and_removes_the_rest(
    first: tuple[Path, Run],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, run = first
    shutil.copytree(folder / "runs", tmp_path / "runs")
    made = [
        path
        for path in (tmp_path / "runs").glob("*/*/manifest.json")
        if path.parent.name not in str(run.summary)
    ]
    (tmp_path / "runs" / "shard" / "0123456789abcdef" / "train").mkdir(parents=True)
    (tmp_path / "runs" / "shard" / "0123456789abcdef" / "train" / "part-00000.parquet").write_bytes(
        b"x" * 2**20
    )
    for flags, left in (([], True), (["--yes"], False)):
        done = subprocess.run(
            [*LLAVA, "prune", "--fresh", "0", *flags], cwd=tmp_path, env=environment(), capture_output=True,
            text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "unfinished        1.0 MiB" in done.stderr
        assert (tmp_path / "runs" / "shard" / "0123456789abcdef" / "train").exists() is left
    assert not any(path.exists() for path in made)
    monkeypatch.chdir(tmp_path)
    for uri in run.summary["artifacts"].values():
        show(str(tmp_path / "runs" / Path(uri).relative_to(folder / "runs")))
        assert "all there" in capsys.readouterr().err


@pytest.mark.drill
def test_real_photos_go_the_whole_way_to_a_registered_version(
    coco_folder: Path, first: tuple[Path, Run]
) -> None:
    folder, _ = first
    run = llava(
        "train", "tiny", "--set", "shard.source=coco", "--set", f"shard.path={coco_folder}",
        "--set", "register.name=llava-photos", *ALONE, cwd=folder,
    )  # fmt: skip
    assert run.status == 0, run.err
    for stage in ("pretrain", "finetune"):
        trained = open_artifact(run.summary["artifacts"][stage]).manifest.metrics
        assert trained["train/loss_last"] < trained["train/loss_first"]
    assert run.summary["model"]["name"] == "llava-photos"
    assert open_artifact(run.summary["artifacts"]["shard"]).manifest.notes["rows"]["train"] > 80
