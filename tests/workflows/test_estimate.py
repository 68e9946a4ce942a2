"""Every preset of the papers, before anything is fetched or paid for; and what `llava estimate` says and refuses."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from components.finetune import Finetune
from components.pretrain import Pretrain
from llava import lora, sizes
from llava import model as models
from llava.errors import RefusedInput
from llava.estimate import GIB
from tests.llava.test_sizes import clip, vicuna
from workflows import cli
from workflows import config as configs
from workflows.estimate import plan, sizes_of

PAPERS = [name for name in configs.preset_names() if name.startswith("llava-")]
COMMITS = [f"backbones.{part}_revision={'0123456789abcdef' * 2}89abcdef" for part in ("vision", "language")]
DATA = ["shard.path=/data", "shard_captions.path=/data"]
EXPECTED = {
    # tower, language model, projector's parameters, tokens of a picture; batch and rate of both stages, epochs
    "llava-v1-7b": (sizes.CLIP_L14, sizes.VICUNA_7B, 4_198_400, 256, (128, 2e-3), (32, 2e-5), 3),
    "llava-v1-13b": (sizes.CLIP_L14, sizes.VICUNA_13B, 5_248_000, 256, (128, 2e-3), (32, 2e-5), 3),
    "llava-v1-scienceqa": (sizes.CLIP_L14, sizes.VICUNA_13B, 5_248_000, 256, (128, 2e-3), (32, 2e-5), 12),
    "llava-v1.5-7b": (sizes.CLIP_L14_336, sizes.VICUNA_7B, 20_979_712, 576, (256, 1e-3), (128, 2e-5), 1),
    "llava-v1.5-13b": (sizes.CLIP_L14_336, sizes.VICUNA_13B, 31_467_520, 576, (256, 1e-3), (128, 2e-5), 1),
    "llava-v1.5-7b-lora": (sizes.CLIP_L14_336, sizes.VICUNA_7B, 20_979_712, 576, (256, 1e-3), (128, 2e-4), 1),
    "llava-v1.5-7b-qlora": (
        sizes.CLIP_L14_336,
        sizes.VICUNA_7B,
        20_979_712,
        576,
        (256, 1e-3),
        (128, 2e-4),
        1,
    ),
    "llava-v1.5-13b-lora": (
        sizes.CLIP_L14_336,
        sizes.VICUNA_13B,
        31_467_520,
        576,
        (256, 1e-3),
        (128, 2e-4),
        1,
    ),
}


def test_there_is_a_preset_for_each_model_of_the_papers() -> None:
    assert sorted(EXPECTED) == PAPERS


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_is_the_papers_recipe(name: str) -> None:
    config = configs.load(name, [*COMMITS, *DATA])
    vision, language, projector, tokens, first, second, epochs = EXPECTED[name]
    model = sizes_of(config)
    assert (model.vision, model.language, model.projector_parameters) == (vision, language, projector)
    assert (model.image_tokens, model.feature_layer, model.keep_cls) == (tokens, -2, False)
    assert config.backbones.image_fit == ("pad" if "v1.5" in name else "crop")
    pretrain, finetune = config.pretrain, config.finetune
    # Stage 1 of v1.5 crops: its script names no image_aspect_ratio.
    assert (pretrain.image_fit, finetune.image_fit) == ("crop", config.backbones.image_fit)
    assert (pretrain.global_batch, pretrain.learning_rate) == first
    assert (finetune.global_batch, finetune.learning_rate) == second
    assert (pretrain.template, pretrain.epochs) == ("plain", 1)
    assert (finetune.template, finetune.epochs) == ("v1", epochs)
    assert finetune.lora is name.endswith("lora")
    assert finetune.lora_bits == (4 if "qlora" in name else 16)
    if finetune.lora:
        assert (finetune.lora_rank, finetune.lora_alpha, finetune.projector_learning_rate) == (128, 256, 2e-5)
    for stage in (pretrain, finetune):
        assert (stage.weight_decay, stage.warmup_ratio, stage.precision, stage.max_length) == (
            0,
            0.03,
            "bf16",
            2048,
        )
        workers = 1 if "qlora" in name else 8
        assert (stage.workers, stage.gpu, stage.global_batch % stage.workers) == (workers, True, 0)


@pytest.mark.parametrize("name", PAPERS)
def test_every_line_of_a_recipe_stands_under_its_source(name: str) -> None:
    text = (configs.PRESETS / f"{name}.yaml").read_text()
    recipe = (
        "vision:",
        "language:",
        "projector:",
        "feature_layer:",
        "global_batch:",
        "weight_decay:",
        "max_length:",
    )
    lines = [line.strip() for line in text.splitlines()]
    for number, line in enumerate(lines):
        if line.startswith(recipe):
            above = next(each for each in reversed(lines[:number]) if each.startswith("#"))
            assert any(
                source in above or source in lines[number - 2] for source in ("v1", "authors", "trained by")
            )


@pytest.mark.parametrize("name", PAPERS)
def test_what_only_the_user_knows_is_asked_for_in_one_line(name: str) -> None:
    with pytest.raises(RefusedInput, match=r"\bshard(_captions)?: source=\w+ needs path"):
        configs.load(name, COMMITS)
    with pytest.raises(RefusedInput, match="vision_revision='main' is no commit"):
        configs.load(name, [*DATA, "backbones.vision_revision=main"])
    config = configs.load(name, DATA)
    with pytest.raises(
        RefusedInput, match=r"backbones\.vision_revision is missing: the commit of openai/clip"
    ):
        from components.backbones.component import Backbones

        Backbones().external(config.backbones)


@pytest.mark.parametrize("name", PAPERS)
def test_eight_cards_of_80_gb_train_every_preset_and_batches_come_out_even(name: str) -> None:
    config, model, stages = plan(name, [], gpus=8, gpu="a100-80g", mfu=0.4)
    assert [each.stage for each in stages] == ["pretrain", "finetune"]
    for each in stages:
        settings = getattr(config, each.stage)
        assert each.best.fits
        assert each.learning == model.trainable(each.training, settings.lora_rank)
        assert each.updates == round(-(-each.corpus.samples // settings.global_batch) * settings.epochs)
        # Sharding: with ZeRO-3 a card holds an eighth of everything that is stored or updated.
        third = next(choice for choice in each.found if choice.setup.zero_stage == 3)
        stored = model.parameters + (model.language.lora_parameters(128) if each.training == "lora" else 0)
        if settings.lora_bits == 16:
            assert third.memory.weights == 2 * stored / 8
        assert third.memory.optimizer == 12 * each.learning / 8
    hours = {each.stage: each.hours for each in stages}
    assert 0 < hours["pretrain"] < 6 and 0 < hours["finetune"] < 24


@pytest.mark.parametrize("name", PAPERS)
def test_every_preset_is_built_on_the_meta_device_and_its_stages_train_what_the_estimate_says(
    name: str,
) -> None:
    config, shapes, stages = plan(name, [], gpus=8, gpu="a100-80g", mfu=0.4)
    act = "linear" if config.backbones.projector == "linear" else "gelu"
    stock = LlavaConfig(
        vision_config=clip(shapes.vision), text_config=vicuna(shapes.language), projector_hidden_act=act
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(stock)
    assert model.num_parameters() == shapes.parameters
    parts = {"pretrain": list(Pretrain.trains), "finetune": list(Finetune.trains)}
    for stage in stages:
        models.set_trainable(model, parts[stage.stage])
        settings = getattr(config, stage.stage)
        if settings.lora:
            with torch.device("meta"):
                lora.inject(model, settings.adapters(), settings.seed)
        learning = sum(one.numel() for one in model.parameters() if one.requires_grad)
        assert learning == stage.learning


@pytest.fixture
def llava(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Command":
    monkeypatch.chdir(tmp_path)
    return Command(capsys, monkeypatch)


class Command:
    """`llava estimate` in this process: `(status, standard output, standard error)`."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["llava", "estimate", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = self._capsys.readouterr()
        return int(left.value.code or 0), out, err


def test_the_estimate_of_a_paper_needs_nothing_but_its_name(llava: Command) -> None:
    status, out, _ = llava("llava-v1.5-7b", "--gpus", "8", "--gpu", "h100-80g", "--price-per-hour", "2.5")
    assert status == 0
    assert "language model 6.74B" in out and "choose ZeRO-" in out
    assert "h at 40% MFU" in out and "2.5 per GPU and hour" in out


def test_json_holds_every_figure(llava: Command) -> None:
    status, out, _ = llava("llava-v1.5-7b", "--gpu", "h200-141g", "--mfu", "0.5", "--json")
    assert status == 0
    found = json.loads(out)
    stage = found["stages"]["finetune"]
    assert found["parameters"]["language_model"] == 6_738_415_616
    assert {choice["zero_stage"] for choice in stage["choices"]} == {1, 2, 3}
    assert stage["chosen"] in stage["choices"] and stage["chosen"]["fits"]
    memory = stage["chosen"]["memory"]
    assert memory["total"] <= found["gpu"]["usable_bytes"] < 141 * GIB
    assert memory["allocated"] < memory["total"]
    language = stage["flops_per_sample"]["language"]
    tokens = 350 + 0.94 * 576
    assert language == pytest.approx(6 * sizes.VICUNA_7B.token_weights * tokens)
    flops = language + stage["flops_per_sample"]["vocabulary"]
    assert stage["hours"] == pytest.approx(flops * 665_000 / (0.5 * 8 * 989e12) / 3600)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llava-v1.5-13b", "--gpus", "1"], "finetune on 1 x h100-80g does not fit: the least is"),
        (["llava-v1.5-7b", "--gpu", "b9000"], "GPU 'b9000' is unknown"),
        (["llava-v1.5-7b", "--mfu", "40"], "--mfu 40.0: a share between 0 and 1"),
        (["llava-v1.5-7b", "--set", "backbones.language=some/model"], "its shapes are not known before"),
        (["llava-v1.5-7b", "--set", "backbones.language=/no/where"], "/no/where"),
        (["llava-v1.5-7b", "--set", "finetune.epoch=2"], "finetune.epoch: unknown key"),
        (["llava-v1.5-7b", "--set", "estimate.finetune.token=2"], "estimate.finetune.token: unknown key"),
    ],
)
def test_what_cannot_be_estimated_is_one_line_and_status_2(
    llava: Command, arguments: list[str], message: str
) -> None:
    status, out, err = llava(*arguments)
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_a_fixed_setting_is_kept_and_auto_is_open(llava: Command) -> None:
    fixed = ["finetune.zero_stage=3", "finetune.checkpointing=full", "finetune.tokens_per_row=8192"]
    _, _, (_, stage) = plan("llava-v1.5-7b", fixed, 8, "a100-80g", 0.4)
    assert [
        (each.setup.zero_stage, each.setup.checkpointing, each.setup.tokens_per_row) for each in stage.found
    ] == [(3, "full", 8192)]


def test_the_published_hours_of_13b_come_out_at_28_percent(llava: Command) -> None:
    """v1.5, section 3.3: 5.5 h and 20 h on eight A100; 28 % for both stages gives 6.7 h and 18.0 h."""
    _, _, stages = plan("llava-v1.5-13b", [], 8, "a100-80g", 0.28)
    assert [round(stage.hours, 1) for stage in stages] == [6.7, 18.0]
    assert sum(stage.hours for stage in stages) == pytest.approx(5.5 + 20, rel=0.05)


def test_the_start_the_checkpoints_and_the_export_are_counted(llava: Command) -> None:
    _, out, _ = llava("llava-v1.5-13b", "--gpus", "16", "--gpu", "l4-24g", "--set", "finetune.zero_stage=3")
    finetune = out.partition("\nfinetune: ")[2]
    for line in (
        "  start: ",
        "  checkpoint: 145.8 GiB; each rank writes 9.1 GiB",
        "  model at the end: 24.9 GiB",
    ):
        assert line in finetune, out
    assert "  host memory: 13.1 GiB a rank at its peak: program 4.0, saving 9.1" in finetune
    found = json.loads(llava("llava-v1.5-13b", "--gpus", "16", "--json")[1])["stages"]["finetune"]
    assert found["host_memory"]["saving"] == pytest.approx(found["checkpoint_bytes"] / 16)


@pytest.mark.parametrize(
    ("gpus", "gpu", "ways"),
    [
        (
            "1",
            "rtx4090-24g",
            ["8 of these cards", "finetune.lora=true", "finetune.offload=true", "1 x h200-141g"],
        ),
        (
            "2",
            "a100-40g",
            ["4 of these cards", "finetune.lora=true", "finetune.offload=true", "2 x a100-80g"],
        ),
    ],
)
def test_a_refusal_says_what_would_fit_and_it_does(
    llava: Command, gpus: str, gpu: str, ways: list[str]
) -> None:
    status, _, err = llava("llava-v1.5-7b", "--gpus", gpus, "--gpu", gpu)
    assert status == 2
    told = err.partition("What would fit: ")[2]
    assert all(way in told for way in ways), err
    assert "of host memory in all, an update takes 1." in told
    for way in told.strip().split("; "):
        card = way.partition(" x ")[2] or gpu
        count = way.partition(" of these")[0] if "of these" in way else gpus
        sets = [
            part for key in way.partition(" (")[0].split(" and ") if "=" in key for part in ("--set", key)
        ]
        assert llava("llava-v1.5-7b", "--gpus", count, "--gpu", card, *sets)[0] == 0, way


@pytest.mark.parametrize(
    "sets",
    [
        ["finetune.zero_stage=1"],
        ["finetune.tokens_per_row=16384", "finetune.checkpointing=none"],
        ["finetune.zero_stage=3", "finetune.deepspeed_config=ZERO_3"],
    ],
)
def test_what_a_refusal_offers_can_be_written_and_fits(
    llava: Command, tmp_path: Path, sets: list[str]
) -> None:
    """Also where a setting that was made stands in the way, or a DeepSpeed JSON that repeats one."""
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    given = [part for one in sets for part in ("--set", one.replace("ZERO_3", str(tmp_path / "zero3.json")))]
    status, _, err = llava("llava-v1.5-7b", "--gpus", "1", "--gpu", "a100-40g", *given)
    assert status == 2 and "does not fit: the least" in err, err
    ways = err.partition("What would fit: ")[2].strip().split("; ")
    assert len(ways) >= 2, err
    for way in ways:
        written = way.partition(" (")[0]
        count = written.partition(" of these")[0] if "of these" in written else "1"
        card = written.partition(" with ")[0].partition(" x ")[2] or "a100-40g"
        more = [word.strip(",") for word in written.split() if word.startswith("finetune.")]
        changes = [part for one in more for part in ("--set", one)]
        status, _, told = llava("llava-v1.5-7b", "--gpus", count, "--gpu", card, *given, *changes)
        assert status == 0, (way, told)


def test_lora_is_what_one_card_can_train(llava: Command) -> None:
    assert llava("llava-v1.5-7b", "--gpus", "1", "--gpu", "a100-80g")[0] == 2
    assert llava("llava-v1.5-7b-lora", "--gpus", "1", "--gpu", "a100-80g")[0] == 0


def test_qlora_is_what_one_card_of_24_gb_can_train_with_room_to_spare(llava: Command) -> None:
    _, _, stages = plan("llava-v1.5-7b-qlora", [], gpus=1, gpu="rtx4090-24g", mfu=0.4)
    assert [each.best.roomy for each in stages] == [True, True]
    half, whole = (
        plan("llava-v1.5-7b-qlora", [f"finetune.lora_bits={bits}"], 1, "a100-80g", 0.4)[2][1]
        for bits in (4, 16)
    )
    saved = whole.found[0].memory.weights - half.found[0].memory.weights
    # 16 bits of each weight become four, and 0.127 bits of scales (arXiv 2305.14314, section 3).
    assert saved == pytest.approx(sizes.VICUNA_7B.token_weights * (16 - 4.127) / 8, rel=1e-4)


def test_a_tower_that_learns_is_part_of_the_plan() -> None:
    rate = ["finetune.vision_learning_rate=2e-6"]
    (frozen, learning) = (plan("llava-v1.5-7b", more, 8, "h100-80g", 0.4)[2] for more in ([], rate))
    assert learning[0].learning == frozen[0].learning, "stage 1 has no such setting"
    # CLIP ViT-L/14 at 336 px without its last layer of 24 and the norm behind it.
    assert learning[1].learning - frozen[1].learning == 303_507_456 - 12_596_224 - 2048
    before, after = (stages[1].found[0].memory for stages in (frozen, learning))
    assert after.optimizer > before.optimizer and after.activations > before.activations


def test_the_tiny_preset_is_estimated_from_its_towers(llava: Command) -> None:
    status, out, _ = llava("tiny", "--gpus", "1", "--gpu", "l4-24g")
    assert status == 0
    assert "assumed: set estimate.finetune" in out
    assert " h at " not in out
