"""Model folders from anybody: none of their code runs, and whatever is wrong with one is a line that names it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from components.backbones.sources import load_language, load_vision
from llava import generate
from llava.errors import RefusedInput
from tests.support.command import llava
from tests.support.tiny_llava import tiny_llava

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("sound") / "model")


def changed(file: str, *keys: str, to: Any) -> Damage:
    """One value of a JSON file."""

    def damage(folder: Path) -> None:
        tree = node = json.loads((folder / file).read_text())
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = to
        (folder / file).write_text(json.dumps(tree))

    return damage


def written(file: str, text: str) -> Damage:
    return lambda folder: (folder / file).write_text(text)


def cut(file: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * share)])

    return damage


def reshaped(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("linear_1.weight"))
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN: dict[str, Damage] = {
    "weights cut off": cut("model.safetensors", 0.7),
    "weights cut off in their header": cut("model.safetensors", 0.001),
    "empty weights": written("model.safetensors", ""),
    "weights of another shape": reshaped,
    "tokenizer {}": written("tokenizer.json", "{}"),
    "tokenizer no JSON": cut("tokenizer.json", 0.5),
    "config []": written("config.json", "[]"),
    "config no JSON": written("config.json", "{"),
    "config too deep": written("config.json", "[" * 100_000),
    "config not UTF-8": lambda folder: (folder / "config.json").write_bytes(b'{"model_type": "\xff"}'),
    "text config a list": changed("config.json", "text_config", to=[]),
    "patch size 0": changed("config.json", "vision_config", "patch_size", to=0),
    "patch size of the processor 0": changed("processor_config.json", "patch_size", to=0),
    "image size a text": changed("config.json", "vision_config", "image_size", to="big"),
    "a billion layers": changed("config.json", "text_config", "num_hidden_layers", to=10**9),
    "a type of model that is none": changed("config.json", "text_config", "model_type", to="evil"),
    "a precision that is none": changed("config.json", "dtype", to="evil"),
    "pictures of another size": changed("preprocessor_config.json", "size", to={"height": 32, "width": 32}),
    "picture size 0": changed("preprocessor_config.json", "size", to={"height": 0, "width": 0}),
    "processor []": written("processor_config.json", "[]"),
    "an adapter": written("adapter_config.json", '{"base_model_name_or_path": "/etc"}'),
    "kernels from elsewhere": changed("config.json", "text_config", "attn_implementation", to="evil/kernel"),
    "a chat template that is no Jinja": written("chat_template.jinja", "{% for message in"),
    "a chat template that writes nothing": written("chat_template.jinja", ""),
    "a chat template that fails": written("chat_template.jinja", "{{ raise_exception('no') }}"),
    "a chat template that recurs": written(
        "chat_template.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    ),
    "a chat template too long": written("chat_template.jinja", "{{ 'x' * 10000000000 }}"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_in_one_line_that_names_it(name: str, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(sound, folder)
    BROKEN[name](folder)
    with pytest.raises(RefusedInput) as refused:
        generate.load(folder)
    line = str(refused.value)
    assert "\n" not in line and len(line) < 1000
    assert str(folder) in line or "chat template" in line


@pytest.mark.slow
def test_the_command_says_it_in_one_line(sound: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    for number, name in enumerate(("weights cut off", "tokenizer {}", "patch size 0")):
        folder = tmp_path / f"folder-{number}"
        shutil.copytree(sound, folder)
        BROKEN[name](folder)
        ended = llava("ask", "--model", folder, "--image", "red.png", "What?", cwd=tmp_path)
        assert (ended.status, ended.out) == (2, ""), ended.err
        assert ended.line.startswith("error: ") and str(folder) in ended.line
        assert "Traceback" not in ended.err


MAPS = {
    "config.json": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    "tokenizer_config.json": {"AutoTokenizer": [None, "evil.Evil"]},
    "preprocessor_config.json": {"AutoImageProcessor": "evil.Evil"},
    "processor_config.json": {"AutoProcessor": "evil.Evil", "AutoImageProcessor": "evil.Evil"},
}


def trapped(folder: Path, mark: Path) -> Path:
    """Every file names code of the folder that writes `mark`."""
    for file, classes in MAPS.items():
        tree = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        if file == "preprocessor_config.json":
            tree["image_processor_type"] = "EvilImageProcessor"
        (folder / file).write_text(json.dumps({**tree, "auto_map": classes}))
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    return folder


@pytest.fixture
def towers(tmp_path: Path) -> dict[str, Path]:
    """The tiny towers, each in a folder of its own with `auto_map` in every file."""
    from components.backbones import shipped

    found = {}
    for name in (shipped.VISION, shipped.LANGUAGE):
        found[name] = tmp_path / name
        shutil.copytree(shipped.TOWERS / name, found[name])
        trapped(found[name], tmp_path / "ran")
    return found


@pytest.mark.services
def test_yes_on_a_pipe_runs_no_code(towers: dict[str, Path], tmp_path: Path) -> None:
    settings = {"kind": "hub", "vision": towers["vision"], "language": towers["language"]}
    told = [part for key, value in settings.items() for part in ("--set", f"backbones.{key}={value}")]
    ended = llava(
        "backbones", "tiny", "--root", "root", *told, cwd=tmp_path, stdin="yes\n" * 1000, seconds=300
    )
    assert not (tmp_path / "ran").exists()
    assert ended.status in (0, 2) and "Traceback" not in ended.err, ended.err
    assert "trust" not in ended.out


@pytest.mark.parametrize("load", [load_vision, load_language])
def test_nobody_is_asked_whether_code_may_run(
    load: Callable[[Path, str], Any], towers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a person was asked"))
    with pytest.raises(RefusedInput, match="backbones"):
        load(towers["language" if load is load_vision else "vision"], "backbones.tower")
    try:
        load(towers["vision" if load is load_vision else "language"], "backbones.tower")
    except RefusedInput as refused:
        assert "custom code" in str(refused) or "image processor" in str(refused)
    assert not (tmp_path / "ran").exists()


def test_a_refusal_of_weights_comes_at_once(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(sound, folder)
    changed("config.json", "text_config", "vocab_size", to=10**12)(folder)
    began = time.monotonic()
    with pytest.raises(RefusedInput):
        generate.load(folder)
    assert time.monotonic() - began < 60
