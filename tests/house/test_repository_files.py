"""Files for people and services around the code: workflows, templates, hooks, and what a built wheel contains."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.repository import REPOSITORY

PACKAGES = ("llava", "components", "workflows")
GITHUB = REPOSITORY / ".github"
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
FIELDS = {"textarea", "input", "dropdown", "checkboxes"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def targets() -> dict[str, list[str]]:
    """The Makefile's targets, each with its commands."""
    found: dict[str, list[str]] = {}
    commands: list[str] = []
    for line in (REPOSITORY / "Makefile").read_text().splitlines():
        if match := re.match(r"([\w./-]+):(?!=)", line):
            commands = found.setdefault(match[1], [])
        elif line.startswith("\t"):
            commands.append(line.strip().replace("$(BIN)", ".venv/bin"))
    return found


def test_the_workflow_runs_what_a_person_runs() -> None:
    job = read(GITHUB / "workflows" / "ci.yml")["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    script = REPOSITORY / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    assert "make test" in script.read_text().splitlines()


def test_the_workflow_reads_only_and_ends_what_a_newer_push_replaces() -> None:
    workflow = read(GITHUB / "workflows" / "ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    uses = [step["uses"] for step in workflow["jobs"]["test"]["steps"] if "uses" in step]
    assert uses and all(re.fullmatch(r"actions/[\w-]+@(v\d+|[0-9a-f]{40})", use) for use in uses)


def test_the_workflow_tests_the_python_that_the_package_names() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (\d+\.\d+)", "\n".join(project["classifiers"]))
    steps = read(GITHUB / "workflows" / "ci.yml")["jobs"]["test"]["steps"]
    assert [
        step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})
    ] == named
    assert project["requires-python"] == f">={named[0]}"


def test_dependabot_looks_at_packages_and_actions_once_a_week_in_one_request_each() -> None:
    updates = read(GITHUB / "dependabot.yml")["updates"]
    assert [one["package-ecosystem"] for one in updates] == ["pip", "github-actions"]
    assert all(one["schedule"]["interval"] == "weekly" and len(one["groups"]) == 1 for one in updates)


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_an_issue_form_has_what_github_asks_of_one(form: Path) -> None:
    found = read(form)
    assert found["name"] and found["description"]
    fields = [one for one in found["body"] if one["type"] in FIELDS]
    assert len(fields) == len(found["body"]) == len({one["id"] for one in fields})
    assert all(one["attributes"]["label"] for one in fields)
    assert any(one.get("validations", {}).get("required") for one in fields)


def test_there_is_a_form_for_bugs_and_one_for_features() -> None:
    assert [form.stem for form in FORMS] == ["bug_report", "feature_request"]
    assert isinstance(read(GITHUB / "ISSUE_TEMPLATE" / "config.yml")["blank_issues_enabled"], bool)


def test_hooks_are_what_make_lint_calls() -> None:
    (repository,) = read(REPOSITORY / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == targets()["lint"]
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in repository["hooks"])


def test_editors_are_told_the_line_length_that_ruff_checks() -> None:
    ruff = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["ruff"]
    assert f"max_line_length = {ruff['line-length']}" in (REPOSITORY / ".editorconfig").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout, built from a copy without asking any index."""
    copy = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(next((copy / "dist").glob("*.whl")))


def test_a_wheel_has_every_file_that_git_has_of_the_packages(wheel: zipfile.ZipFile) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *PACKAGES],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    kept = {name for name in listed if (REPOSITORY / name).is_file()}
    missing = sorted(kept - set(wheel.namelist()))
    assert not missing


def test_a_wheel_says_that_it_is_typed(wheel: zipfile.ZipFile) -> None:
    assert {f"{name}/py.typed" for name in PACKAGES} <= set(wheel.namelist())
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    headers = HeaderParser().parsestr(wheel.read(name).decode())
    assert "Typing :: Typed" in headers.get_all("Classifier", [])


def test_the_checklist_of_a_pull_request_names_targets_that_exist() -> None:
    named = re.findall(r"`make (\w+)`", (GITHUB / "pull_request_template.md").read_text())
    assert named and set(named) <= set(targets())
