"""The template of a run, and the entrypoint that two shells read."""

import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from llava.errors import RefusedInput
from tests.support.kubernetes.api_server import ApiServer
from tests.support.kubernetes.submitting import TRAIN, Command, last
from workflows.kubernetes import rayjob

MISTAKES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda spec: spec.update(submissionMode="K8sJobmode"), "submissionMode 'K8sJobmode'"),
    (lambda spec: spec.update(submissionMode="SidecarMode"), "submissionMode 'SidecarMode'"),
    (lambda spec: spec.update(shutdownAfterJobFinishes=False), "need shutdownAfterJobFinishes: true"),
    (lambda spec: spec.update(ttlSecondsAfterFinished=-1), "ttlSecondsAfterFinished is -1"),
    (
        lambda spec: spec.update(
            deletionStrategy={"deletionRules": [{"policy": "DeleteSelf", "condition": {}}]}
        ),
        "exclude each other",
    ),
    (lambda spec: spec.update(clusterSelector={"ray.io/cluster": "x"}), "no clusterSelector"),
    (lambda spec: spec["rayClusterSpec"].pop("authOptions"), "authOptions.mode"),
    (lambda spec: spec.update(entrypoint="python train.py"), "the template's entrypoint"),
]


@pytest.mark.parametrize(("spoil", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_what_the_crd_lets_pass_is_refused(
    llava: Command, server: ApiServer, spoil: Callable[[dict[str, Any]], Any], message: str
) -> None:
    spoil(server.jobs["llava"]["spec"])
    status, _, err = llava(*TRAIN)
    assert (status, message in last(err)) == (2, True), err
    assert server.bodies == []


def test_a_template_whose_copies_names_are_too_long_is_refused(llava: Command, server: ApiServer) -> None:
    name = "a-workflow-with-a-long-name"
    server.put({**server.jobs["llava"], "metadata": {**server.jobs["llava"]["metadata"], "name": name}})
    status, _, err = llava(*TRAIN, "--template", name, "--allow-parallel")
    assert (status, "a name has at most 47 characters" in last(err)) == (2, True)


@pytest.mark.parametrize("job", ["now", "2nd-look", "look-20261123", "look-7"])
def test_a_job_that_is_named_by_hand_means_now(job: str) -> None:
    before = datetime.datetime.now(datetime.UTC)
    assert before <= rayjob.minute_of(f"job/{job}") <= datetime.datetime.now(datetime.UTC)


def test_an_entrypoint_that_two_shells_would_read_is_refused() -> None:
    for value in ("a;b", "$HOME", "`id`", "a'b", 'a"b', "a\nb", "a|b", "a>b", "~/x"):
        with pytest.raises(RefusedInput, match="passes two shells"):
            str(rayjob.Entrypoint("train", "tiny", "s3://b/r", sets=(f"register.name={value}",)))


def test_the_words_of_an_entrypoint_survive_both_shells() -> None:
    words = ("instruct.kinds=[colour, shape]", "finetune.learning_rate=2.0e-5")
    entrypoint = rayjob.Entrypoint("train", "tiny", "s3://bucket/root", sets=words)
    show = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"

    def shell(line: str) -> list[str]:
        done = subprocess.run(["sh", "-c", f"{show} {line}"], capture_output=True, text=True, check=True)
        read: list[str] = json.loads(done.stdout)
        return read

    # The submitter's shell reads it, `ray job submit` joins the words again, the head's shell reads that.
    last_words = shell(subprocess.list2cmdline(shell(str(entrypoint))))
    assert rayjob.Entrypoint.parse(shlex.join(last_words)) == entrypoint
