"""docs/cluster.md: a cold start in ten commands, in our own words, honest about what was not run."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.kubernetes.policies import parse
from tests.support.kubernetes.rendering import K8S, KUBECTL, VARIANTS, pods, render

DOCS = K8S.parent / "docs" / "cluster.md"
TEXT = DOCS.read_text()
COLD_START = TEXT.split("## From an empty cluster")[1].split("\n## ")[0]


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_a_cold_start_takes_at_most_ten_commands_and_ends_with_training() -> None:
    typed = commands(COLD_START)
    numbered = re.findall(r"^(\d+)\. ", COLD_START, re.M)
    print("\n".join(f"{number}. {command}" for number, command in zip(numbered, typed, strict=True)))
    assert len(typed) <= 10
    assert typed[-1].startswith("llava submit --command train")
    assert "Eight commands." in COLD_START and len(typed) == 8


def test_what_needs_a_cluster_is_marked_as_not_run() -> None:
    steps = re.split(r"^\d+\. ", COLD_START, flags=re.M)[1:]
    assert [step for step in steps if "not run" not in step] == []


@pytest.mark.parametrize("command", [line for line in commands(TEXT) if line.startswith("llava ")])
def test_every_llava_command_is_one_of_ours(command: str) -> None:
    assert parse(shlex.split(command)) == command.split()[1]


def test_every_path_that_is_named_exists() -> None:
    named = set(re.findall(r"\bk8s/[\w./-]*\w", TEXT)) | {
        f"tests/{name}" for name in re.findall(r"`tests/(\S+?)`", TEXT)
    }
    assert named and [name for name in named if not (K8S.parent / name).exists()] == []


def test_the_number_of_objects_is_that_of_the_overlay() -> None:
    assert f"prints the {len(render('local'))} objects" in TEXT


def test_the_script_makes_every_key_that_a_pod_needs(tmp_path: Path) -> None:
    env = {
        **os.environ,
        "PATH": f"{KUBECTL.parent}{os.pathsep}{os.environ['PATH']}",
        "KUBECONFIG": str(tmp_path / "none"),
    }
    command = ["sh", str(K8S / "secrets.sh"), "--dry-run=client", "-o", "json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    made = {
        one["metadata"]["name"]: set(one["data"])
        for one in yaml.safe_load_all(done.stdout.replace("}\n{", "}\n---\n{"))
    }
    assert set(made) == {"llava-s3", "llava-mlflow", "llava-mlflow-server"}
    for variant in VARIANTS:
        for place, pod in pods(render(variant)):
            for container in pod["containers"]:
                for variable in container.get("env", []):
                    if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                        assert reference["key"] in made[reference["name"]], place
