"""`llava submit` in this process, against a server that answers as the Kubernetes API server does."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.kubernetes.api_server import TOKEN, ApiServer, serve
from tests.support.kubernetes.rendering import of_kind, render
from tests.support.kubernetes.submitting import Command
from workflows import cli
from workflows.kubernetes import api, follow


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """The API server with the template of `base` applied, and a client that waits little."""
    monkeypatch.setattr(api, "PAUSE_S", 0.01)
    monkeypatch.setattr(follow, "RECONNECT_S", 0.05)
    with serve() as state:
        (template,) = of_kind(render("base"), "RayJob")
        state.put(template)
        yield state


@pytest.fixture
def kubeconfig(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": server.url}}],
        "users": [{"name": "test", "user": {"token": TOKEN}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(path))
    # The client library reads the variable when it is first imported.
    from kubernetes.config import kube_config

    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    return path


@pytest.fixture
def llava(kubeconfig: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line in this process: (status, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llava", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run
