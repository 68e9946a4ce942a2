"""Backbones from a hub that answers, from folders, and all that is refused before anything is fetched."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from components.backbones.component import Backbones, BackbonesSettings
from components.contract import Artifact, Tracking, Workspace, open_store, run_component
from llava import pretrained
from llava.errors import LlavaError, RefusedInput
from llava.generate import template_name
from tests.components.conftest import Lines

COMMIT = {
    "vision": "0123456789abcdef0123456789abcdef01234567",
    "language": "fedcba9876543210" * 2 + "fedcba98",
}
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "two",
    "red",
    "circles",
    "near",
    "one",
    "small",
    "blue",
]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vision`: a whole CLIP, `language`: a Llama in fp16 and two files; both as pickles, as older repositories are."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(11)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPModel(
        CLIPConfig(
            vision_config={**small, "image_size": 64, "patch_size": 16},
            text_config={**small, "vocab_size": 99, "eos_token_id": 98, "bos_token_id": 0, "pad_token_id": 1},
            projection_dim=16,
        )
    )
    (folder / "vision").mkdir()
    clip.config.save_pretrained(folder / "vision")
    CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(
        folder / "vision"
    )
    torch.save(clip.state_dict(), folder / "vision" / "pytorch_model.bin")

    language = folder / "language"
    language.mkdir()
    pieces = sentencepiece_model(language / "tokenizer.model")
    (language / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "unk_token": "<unk>",
                "bos_token": "<s>",
                "eos_token": "</s>",
            }
        )
    )
    llama = LlamaForCausalLM(LlamaConfig(**small, vocab_size=pieces)).half()
    llama.config.dtype = torch.float16
    llama.config.save_pretrained(language)
    state = llama.state_dict()
    names = sorted(state)
    weight_map = {}
    for part, chosen in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"pytorch_model-{part:05d}-of-00002.bin"
        torch.save({name: state[name] for name in chosen}, language / file)
        weight_map |= dict.fromkeys(chosen, file)
    (language / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (language / "modeling_evil.py").write_text("raise SystemExit('code of a repository was run')")
    return folder


def sentencepiece_model(path: Path) -> int:
    """A small vocabulary as Llama's repositories keep it; returns its size."""
    import sentencepiece

    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(WORDS[start:]) for start in range(len(WORDS))] * 5),
            model_writer=file,
            vocab_size=320,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            minloglevel=2,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()


def by_sentencepiece(towers: Path) -> list[int]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(towers / "language" / "tokenizer.model"))
    return model.encode("two red circles")


@pytest.fixture
def make(mlflow_db: str, tmp_path: Path, lines: Lines) -> Callable[..., Artifact]:
    """`make(**settings)`: the artifact, through the real runner and without Ray."""

    def run(**settings: Any) -> Artifact:
        tracking = Tracking(mlflow_db, "backbones", str(tmp_path / "mlflow"))
        workspace = Workspace(open_store(tmp_path / "root"), tracking, console=lines)
        return run_component(Backbones(), BackbonesSettings(kind="hub", **settings), {}, workspace).artifact

    return run


class Hub(http.server.ThreadingHTTPServer):
    """A model hub with two repositories: it lists the files of a commit and hands them out."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.served = folder, list[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    """`/api/models/tests/NAME/...` and `/tests/NAME/resolve/COMMIT/FILE`."""

    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api(parts[3], parts[4], parts[5])
            return
        _, name, _, commit, file = parts
        path = self.server.folder / name / file
        if commit != COMMIT.get(name) or not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = path.read_bytes()
        if self.command == "GET":
            self.server.served.append(f"{name}/{file}")
        self._send(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit})

    def _api(self, name: str, kind: str, revision: str) -> None:
        if name not in COMMIT:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision != COMMIT[name]:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            files = [path for path in sorted((self.server.folder / name).iterdir()) if path.is_file()]
            tree = [
                {"type": "file", "path": path.name, "size": path.stat().st_size,
                 "oid": hashlib.sha1(path.read_bytes()).hexdigest()}
                for path in files
            ]  # fmt: skip
            about = {
                "id": f"tests/{name}",
                "sha": revision,
                "siblings": [{"rfilename": path.name} for path in files],
            }
            self._send(200, json.dumps(tree if kind == "tree" else about).encode(), {})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def hub(towers: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on loopback that `HF_ENDPOINT` names, with an empty cache."""
    import huggingface_hub.constants

    with Hub(towers) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server
        server.shutdown()
        thread.join(5)


def from_hub(**more: Any) -> dict[str, Any]:
    named = {"vision": "tests/vision", "language": "tests/language", "template": "v1"}
    revisions = {f"{what}_revision": commit for what, commit in COMMIT.items()}
    return {**named, **revisions, **more}


def test_a_hub_is_mirrored_at_its_commits_without_code_and_without_pickles(
    hub: Hub, make: Callable[..., Artifact], towers: Path, lines: Lines
) -> None:
    artifact = make(**from_hub())
    assert not any(name.endswith(".py") for name in hub.served)
    assert artifact.manifest.external == {what: f"tests/{what}@{commit}" for what, commit in COMMIT.items()}
    folder = artifact.local("model")
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ".model"}
    stock = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert stock.dtype == torch.float16
    given = torch.load(towers / "language" / "pytorch_model-00002-of-00002.bin", weights_only=True)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        assert torch.equal(
            stock.get_parameter(name.replace("model.", "model.language_model.", 1)), given[name]
        )
    clip = torch.load(towers / "vision" / "pytorch_model.bin", weights_only=True)
    name = "encoder.layers.1.mlp.fc1.weight"
    there = next(
        value for key, value in clip.items() if key.startswith("vision_model") and key.endswith(name)
    )
    assert torch.equal(stock.get_parameter(f"model.vision_tower.{name}"), there.half())
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    assert template_name(processor) == "v1"
    assert processor.tokenizer.encode("two red circles", add_special_tokens=False) == by_sentencepiece(towers)
    assert processor.tokenizer.pad_token == "<unk>"
    assert stock.config.image_token_index == processor.tokenizer.convert_tokens_to_ids("<image>")

    served = len(hub.served)
    assert make(**from_hub()).digest == artifact.digest
    assert len(hub.served) == served
    assert any("finished already" in line for line in lines.said)


def test_folders_do_as_well_and_another_projector_is_another_model(
    make: Callable[..., Artifact], towers: Path, lines: Lines
) -> None:
    named = {"vision": str(towers / "vision"), "language": str(towers / "language"), "template": "v1"}
    artifact = make(**named, projector="linear", keep_cls=True, pad_vocabulary_to=64, dtype="float32")
    stock = LlavaForConditionalGeneration.from_pretrained(artifact.local("model"))
    assert (stock.config.projector_hidden_act, stock.config.image_seq_length) == ("linear", 17)
    assert stock.config.text_config.vocab_size == 384
    assert artifact.manifest.metrics["parameters/projector_trainable"] == 32 * 32 + 32
    assert any("1,056 of it an identity that stays" in line for line in lines.said)
    assert make(**named).digest != artifact.digest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (from_hub(vision_revision="main"), r"vision_revision='main' is no commit: .*40 hexadecimal"),
        (from_hub(language_revision="0" * 40), r"language_revision='0{40}' is no commit"),
        (from_hub(vision_revision="x" * 40), r"vision_revision='x{40}' is no commit"),
        (from_hub(vision="/some/where"), r"vision_revision is for hub repositories; /some/where is a folder"),
        (from_hub(vision="not a name"), r"vision='not a name': give OWNER/NAME"),
        ({"vision": "tests/vision"}, r"kind=hub needs language"),
        (from_hub(retrain=True), r"retrain is for kind=tiny"),
        (from_hub(template="v9"), r"template 'v9' is unknown"),
    ],
)
def test_a_source_that_is_not_pinned_is_refused_when_the_config_is_read(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BackbonesSettings(kind="hub", **settings)


def test_a_missing_commit_is_asked_for_before_anything_is_fetched(
    hub: Hub, make: Callable[..., Artifact]
) -> None:
    with pytest.raises(
        RefusedInput, match=r"vision_revision is missing: the commit of tests/vision"
    ) as caught:
        make(**from_hub(vision_revision=None))
    assert "\n" not in str(caught.value)
    assert hub.served == []


def test_what_the_hub_does_not_have_is_one_line(hub: Hub, make: Callable[..., Artifact]) -> None:
    with pytest.raises(RefusedInput, match=r"no such repository.*HF_TOKEN"):
        make(**from_hub(vision="tests/nothing"))
    with pytest.raises(RefusedInput, match="no such commit"):
        make(**from_hub(vision_revision=COMMIT["language"]))


def test_a_hub_that_is_away_is_one_line(
    make: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    # The hub's client tries again five times, with longer and longer pauses.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(LlavaError, match=r"vision=tests/vision: the hub does not answer") as caught:
        make(**from_hub())
    assert caught.value.exit_status == 1


class Payload:
    """What a pickle can do when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("a pickle ran code",))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: torch.save({"w": Payload()}, folder / "pytorch_model.bin"), "more than tensors"),
        (
            lambda folder: torch.save([torch.zeros(2)], folder / "pytorch_model.bin"),
            "no plain table of tensors",
        ),
        (
            lambda folder: torch.save({"vision_model.w": torch.zeros(2)}, folder / "pytorch_model.bin"),
            "weights are missing.*embed",
        ),
        (lambda folder: (folder / "pytorch_model.bin").unlink(), "no weights"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
            "type 'vit'; known: clip",
        ),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
)
def test_a_damaged_tower_is_refused(
    make: Callable[..., Artifact],
    towers: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    folder = tmp_path / "vision"
    folder.mkdir()
    for path in (towers / "vision").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    with pytest.raises(RefusedInput, match=message):
        make(vision=str(folder), language=str(towers / "language"), template="v1")
    assert "ran code" not in capsys.readouterr().out


def test_tied_weights_of_a_pickle_are_written_apart(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from components.backbones.sources import as_safetensors

    weight = torch.randn(4, 3)
    (tmp_path / "in").mkdir()
    torch.save({"a": weight, "b": weight, "c": weight.T}, tmp_path / "in" / "pytorch_model.bin")
    folder = as_safetensors(tmp_path / "in", tmp_path / "out", print)
    found = load_file(folder / "model.safetensors")
    assert torch.equal(found["a"], weight) and torch.equal(found["b"], weight)
    assert torch.equal(found["c"], weight.T)


def test_a_language_model_that_leaks_between_packed_samples_is_refused(
    make: Callable[..., Artifact], towers: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "lfm2"
    pretrained.tokenizer(towers / "language").save_pretrained(folder)
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    layers = ["conv", "full_attention"]
    config = Lfm2Config(
        **small,
        num_key_value_heads=2,
        num_hidden_layers=2,
        layer_types=layers,
        vocab_size=320,
        pad_token_id=0,
    )
    Lfm2ForCausalLM(config).save_pretrained(folder)
    with pytest.raises(
        RefusedInput, match=rf"^backbones.language={folder}: language model of type 'lfm2': packed"
    ):
        make(vision=str(towers / "vision"), language=str(folder), template="v1")


def test_the_embedding_of_patches_is_no_layer_to_read() -> None:
    with pytest.raises(ValueError, match="feature_layer=0"):
        BackbonesSettings(kind="tiny", feature_layer=0)


def test_a_model_that_is_not_what_its_name_says_is_refused(
    make: Callable[..., Artifact], towers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava import sizes

    monkeypatch.setitem(sizes.PUBLISHED, str(towers / "vision"), sizes.CLIP_L14)
    with pytest.raises(RefusedInput, match=r"expected the published .*1024.* found .*hidden=32"):
        make(vision=str(towers / "vision"), language=str(towers / "language"), template="v1")
