"""What a person types and gets back: bad input is one clear line with its own exit status, before any work."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from components.contract import acquire, open_store
from llava.errors import BadSample, Terminated
from tests.support.tiny_llava import tiny_llava
from workflows import cli


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """The command takes signals; they are the test run's again afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def llava(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Command":
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Command(capsys, monkeypatch)


class Command:
    """The command line in this process: `(status, standard output, standard error)`."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["llava", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = self._capsys.readouterr()
        return int(left.value.code or 0), out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tinny"], "did you mean 'tiny'"),
        (["train", "tiny", "--set", "finetune.learning_rat=1"], "finetune.learning_rat: unknown key"),
        (["train", "tiny", "--set", "finetune.epochs=many"], "finetune.epochs"),
        (["train", "tiny", "--set", "shard.source=coco", "--set", "shard.path=/not/there"], "/not/there"),
        (["train", "tiny", "--set", "shard.hf_secret=abc"], "secrets are read from the environment"),
        (["train", "tiny", "--root", "s3://me:pass@bucket/x"], "credentials"),
        (["train", "tiny", "--root", "ftp://host/x"], "ftp://host/x"),
        (["ask", "--model", "models:/none@champion", "--image", "not-there.jpg", "What?"], "not-there.jpg"),
    ],
)
def test_bad_input_is_one_line_and_status_2(llava: Command, arguments: list[str], message: str) -> None:
    status, out, err = llava(*arguments)
    last = err.strip().splitlines()[-1]
    assert status == 2
    assert out == ""
    assert last.startswith("error: ")
    assert message in last
    assert "pass@" not in err and "abc" not in err and "Traceback" not in err


def test_s3_without_credentials_and_with_a_wrong_endpoint_fails_in_seconds(
    llava: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    status, _, err = llava("train", "tiny", "--root", "s3://bucket/prefix")
    assert (status, "s3://bucket/prefix" in err) == (2, True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    status, _, err = llava("train", "tiny", "--root", "s3://bucket/prefix")
    assert (status, "s3://bucket/prefix" in err, "127.0.0.1:9" in err) == (2, True, True)
    assert time.monotonic() - began < 60


def test_an_mlflow_that_is_away_is_refused_before_any_work(
    llava: Command, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    status, _, err = llava("train", "tiny", "--root", s3_root)
    assert status == 2
    assert "http://127.0.0.1:9" in err
    assert list(open_store(s3_root).list()) == []


def test_a_folder_root_with_an_mlflow_server_is_refused(
    llava: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    status, _, err = llava("train", "tiny", "--root", "runs")
    assert (status, "is a folder and MLflow is a server" in err) == (2, True)


def test_a_second_run_of_the_same_artifact_leaves_with_status_5(llava: Command, tmp_path: Path) -> None:
    status, _, err = llava("backbones", "tiny", "--root", "here")
    assert status == 0, err
    artifact = next((tmp_path / "here" / "backbones").iterdir())
    (artifact / "manifest.json").unlink()
    with acquire(open_store(artifact)):
        status, _, err = llava("train", "tiny", "--root", "here")
    assert status == 5
    assert "is being made by process" in err


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("finetune: {from: s3://AKIAABCDEFGHIJKLMNOP:xyzzy@bucket/x}", "finetune.from"),
        (
            "evaluate: {benchmarks: [{judge: {url: https://me:xyzzy@host/v1}}]}",
            "evaluate.benchmarks[0].judge.url",
        ),
        ("shard: {hf_secret: xyzzy}", "shard.hf_secret"),
    ],
)
def test_a_secret_in_a_file_is_refused_by_its_key(
    llava: Command, tmp_path: Path, written: str, key: str
) -> None:
    (tmp_path / "own.yaml").write_text(written)
    status, out, err = llava("train", "own.yaml")
    assert (status, out) == (2, "")
    assert key in err and "xyzzy" not in err
    assert not (tmp_path / "runs").exists()


def test_more_workers_than_this_machine_holds_are_refused_before_any_work(
    llava: Command, tmp_path: Path
) -> None:
    for setting, what in (("finetune.workers=4000", "take 4000 CPU"), ("evaluate.gpu=true", "take 1 GPU")):
        if "gpu" in setting and torch.cuda.is_available():
            continue
        status, _, err = llava("train", "tiny", "--root", "here", "--set", setting)
        assert status == 2 and what in err
        assert not list((tmp_path / "here").glob("shard/*"))


def test_an_artifact_whose_files_changed_is_refused(llava: Command, tmp_path: Path) -> None:
    assert llava("backbones", "tiny", "--root", "here")[0] == 0
    config = next((tmp_path / "here" / "backbones").glob("*/model/config.json"))
    config.write_text(config.read_text().replace("gelu", "relu"))
    status, _, err = llava("backbones", "tiny", "--root", "here")
    assert status == 2
    assert "model/config.json" in err and "the artifact changed after it was finished" in err


def test_ask_answers_about_a_picture_and_refuses_what_is_none(llava: Command, tmp_path: Path) -> None:
    model = tiny_llava(tmp_path / "model")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    asked = ["ask", "--model", str(model), "--max-new-tokens", "4", "What colour is it?", "--image"]
    status, out, err = llava(*asked, "red.png")
    assert status == 0, err
    assert out.endswith("\n")
    (tmp_path / "text.png").write_text("no picture")
    status, out, err = llava(*asked, "text.png")
    assert (status, out) == (2, "")
    assert "text.png" in err


def test_a_signal_inside_a_compiled_call_of_ray_keeps_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped() -> None:
        raise SystemError("returned a result with an exception set") from Terminated("stopped by SIGTERM")

    monkeypatch.setattr(cli, "app", stopped)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 4
    assert capsys.readouterr().err == "error: stopped by SIGTERM\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_no_failure_of_what_was_being_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    def measuring() -> None:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        while True:
            try:
                time.sleep(0.01)
            except Exception as error:
                raise BadSample("not encodable", str(error)) from error

    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(cli, "app", measuring)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 4
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().err
