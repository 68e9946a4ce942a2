"""The image's recipe: linted, by digest, locked to what the package asks for, and without a compiler at the end."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.repository import REPOSITORY

ROOT = REPOSITORY
IMAGE = ROOT / "k8s" / "image"
DOCKERFILE = (IMAGE / "Dockerfile").read_text()
LOCK = IMAGE / "requirements.txt"
LAST_STAGE = "FROM " + DOCKERFILE.rpartition("\nFROM ")[2]


def locked() -> dict[str, Version]:
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    found = [re.fullmatch(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if match is None]
    return {match[1]: Version(match[2]) for match in found if match}


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, IMAGE / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_is_named_by_a_digest_that_has_no_default() -> None:
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.M) == ["rayproject/ray@${RAY_DIGEST}"] * 2
    assert re.findall(r"^ARG RAY_DIGEST.*$", DOCKERFILE, re.M) == ["ARG RAY_DIGEST"]


def test_it_ends_as_a_user_that_is_not_root_and_holds_no_compiler() -> None:
    assert re.findall(r"^USER (\S+)", LAST_STAGE, re.M) == ["1000:100"]
    assert "apt-get" not in LAST_STAGE
    assert "--no-index" in LAST_STAGE


def test_whatever_comes_from_an_index_has_its_hash() -> None:
    runs = re.findall(r"pip (?:install|download|wheel)(?:[^&\\\n]|\\\n)*", DOCKERFILE)
    assert len(runs) == 5
    for run in runs:
        assert "--no-index" in run or {"--require-hashes", "--no-deps"} <= set(run.split()), run
        # What a source is built with is installed before, from the same lock.
        assert "wheel" not in run.split()[:2] or "--no-build-isolation" in run, run


@pytest.mark.drill
def test_the_index_gives_the_files_with_these_hashes(tmp_path: Path) -> None:
    """All but torch and NVIDIA's libraries, which are gigabytes."""
    small = [
        line
        for line in LOCK.read_text().splitlines(keepends=True)
        if not line.startswith(("#", "deepspeed==", "nvidia-", "torch==", "triton=="))
    ]
    (tmp_path / "wheels.txt").write_text("".join(small))
    pip = [sys.executable, "-m", "pip", "--isolated", "download", "--quiet", "--require-hashes", "--no-deps"]
    where = [
        "--only-binary",
        ":all:",
        "--dest",
        tmp_path / "wheels",
        "--requirement",
        tmp_path / "wheels.txt",
    ]
    subprocess.run(
        [*pip, *where], check=True, timeout=1200, env={**os.environ, "PIP_CONFIG_FILE": os.devnull}
    )
    assert len(list((tmp_path / "wheels").iterdir())) == len(small) > 150


def test_every_dependency_is_locked_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name != "test"}
    asked = f"[{','.join(sorted(extras))}]"
    assert DOCKERFILE.count(asked) == 1 and asked in (IMAGE / "lock.py").read_text(), f"the image has {asked}"
    versions = locked()
    for text in [*project["dependencies"], *(need for needs in extras.values() for need in needs)]:
        wanted = Requirement(text)
        name = wanted.name.lower().replace("_", "-")
        assert name in versions, f"{name}: run python k8s/image/lock.py"
        assert wanted.specifier.contains(versions[name]), f"{text}: {versions[name]} is locked"


def test_what_is_locked_needs_nothing_that_is_not() -> None:
    versions = locked()
    # Torch is left out: what it needs differs from build to build, and it pins that itself.
    installed = {one.metadata["Name"].lower().replace("_", "-"): one for one in metadata.distributions()}
    same = [
        name
        for name in versions.keys() & installed.keys() - {"torch"}
        if Version(installed[name].version) == versions[name]
    ]
    assert len(same) > 50
    for name in same:
        for text in installed[name].requires or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                found = versions.get(re.sub(r"[._]", "-", need.name.lower()))
                assert found is not None and need.specifier.contains(found, prereleases=True), (
                    f"{name} needs {text}"
                )
