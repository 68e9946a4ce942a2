"""`llava submit` through the real client against a server that answers as the Kubernetes API server does."""

import datetime
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.contract import open_store
from tests.support.kubernetes.api_server import ApiServer
from tests.support.kubernetes.rendering import K8S, of_kind, pods, render
from tests.support.kubernetes.submitting import NAME, ORDER, TRAIN, Command, last
from workflows import config as configs
from workflows import estimate
from workflows.kubernetes import rayjob
from workflows.kubernetes.api import Cluster
from workflows.kubernetes.submit import Request, submit


def test_a_run_is_a_copy_of_the_template_that_is_let_go(llava: Command, server: ApiServer) -> None:
    status, out, err = llava(*TRAIN, "--set", "finetune.epochs=2", "--set", "instruct.kinds=[colour, shape]")
    assert (status, out.strip()) == (0, NAME), err
    assert server.requests == ORDER
    assert server.bad_bodies == []
    (body,) = server.bodies
    template = server.jobs["llava"]
    assert body["spec"]["entrypoint"] == (
        "llava train tiny --root s3://bucket/root --set finetune.epochs=2 --set 'instruct.kinds=[colour, shape]' --wait"
    )
    assert body["spec"]["suspend"] is False
    changed = ("entrypoint", "suspend")
    assert {k: v for k, v in body["spec"].items() if k not in changed} == {
        k: v for k, v in template["spec"].items() if k not in changed
    }
    assert body["metadata"]["labels"][rayjob.WORKFLOW] == "llava"
    assert not any(label.startswith("kueue") for label in body["metadata"]["labels"])
    assert template["spec"]["suspend"] is True


def test_without_a_word_the_copy_does_what_the_template_says(
    llava: Command, server: ApiServer, s3_root: str
) -> None:
    template = server.jobs["llava"]
    template["spec"]["entrypoint"] = f"llava retrain tiny --root {s3_root} --drop {s3_root}/in"
    status, out, err = llava("submit", "--scheduled", "job/llava-retrain-29923350")
    assert (status, out.strip()) == (0, "llava-retrain-202611230230"), err
    assert server.bodies[0]["spec"]["entrypoint"] == template["spec"]["entrypoint"]


def test_the_same_minute_three_times_makes_one_run(llava: Command, server: ApiServer) -> None:
    for _ in range(3):
        status, out, err = llava(*TRAIN)
        assert (status, out.strip()) == (0, NAME), err
    assert set(server.jobs) == {"llava", NAME}
    assert "was submitted before" in err


def test_three_at_once_in_the_same_minute_make_one_run(server: ApiServer, kubeconfig: Path) -> None:
    request = Request("train", "tiny", "s3://bucket/root", scheduled="2026-11-23T02:30")
    cluster = Cluster("llava")
    with ThreadPoolExecutor(3) as pool:
        names = list(pool.map(lambda _: submit(request, cluster), range(3)))
    assert names == [NAME] * 3
    assert set(server.jobs) == {"llava", NAME}


def test_a_name_that_is_taken_is_success_where_it_is_the_same_run(llava: Command, server: ApiServer) -> None:
    assert llava(*TRAIN)[0] == 0
    server.jobs[NAME]["metadata"]["labels"].pop(rayjob.WORKFLOW)  # so that the list does not show it: 409
    status, out, err = llava(*TRAIN)
    assert (status, out.strip()) == (0, NAME), err
    assert "was submitted before" in err
    assert server.requests[-2:] == ["POST llava/rayjobs", f"GET llava/rayjobs/{NAME}"]


def test_a_minute_that_is_taken_by_something_else_is_status_5(llava: Command, server: ApiServer) -> None:
    assert llava(*TRAIN)[0] == 0
    status, _, err = llava(*TRAIN, "--set", "finetune.epochs=3")
    assert (status, "in the same minute with something else" in last(err)) == (5, True)


def test_another_run_that_has_not_ended_is_status_5_and_named(llava: Command, server: ApiServer) -> None:
    assert llava(*TRAIN)[0] == 0
    server.set_status(NAME, jobDeploymentStatus="Running", jobStatus="RUNNING")
    later = [*TRAIN[:-1], "2026-11-23T02:31"]
    status, out, err = llava(*later)
    assert (status, out) == (5, "")
    assert f"{NAME} is on (Running, RUNNING)" in last(err)
    assert f"delete rayjob {NAME}" in last(err)
    assert set(server.jobs) == {"llava", NAME}
    status, out, _ = llava(*later, "--allow-parallel")
    assert status == 0
    assert out.startswith("llava-train-202611230231-")


@pytest.mark.parametrize("ended", rayjob.FINISHED)
def test_a_run_that_has_ended_is_in_nobodys_way(llava: Command, server: ApiServer, ended: str) -> None:
    assert llava(*TRAIN)[0] == 0
    server.set_status(NAME, jobDeploymentStatus=ended)
    assert llava(*TRAIN[:-1], "2026-11-23T02:31")[0] == 0


def test_parallel_runs_of_one_minute_have_names_of_their_own(llava: Command, server: ApiServer) -> None:
    names = {llava(*TRAIN, "--allow-parallel", "--set", f"finetune.epochs={n}")[1].strip() for n in (1, 2, 2)}
    assert len(names) == 2
    assert set(server.jobs) == {"llava", *names}


def test_with_a_queue_the_copy_is_kueues_to_start(llava: Command, server: ApiServer) -> None:
    (template,) = of_kind(render("base+kueue"), "RayJob")
    server.put(template)
    status, _, err = llava(*TRAIN)
    assert status == 0, err
    body = server.bodies[0]
    assert body["spec"]["suspend"] is True
    assert body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "llava"
    assert body["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "llava-training"


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("tinny",), "is not in the run's pods"),
    (("my.yaml",), "/etc/llava/presets/my.yaml"),
    (("tiny", "--set", "finetune.epoch=2"), "finetune.epoch: unknown key"),
    (("tiny", "--set", "register.api_key=x"), "secrets are read from the environment"),
    (("tiny", "--set", "register.name=$(id)"), "passes two shells"),
    (("tiny", "--root", "runs"), "s3://bucket/prefix"),
    (("tiny", "--root", "s3://me:secret@bucket/x"), "credentials"),
    (("tiny", "--scheduled", "tomorrow"), "--scheduled 'tomorrow'"),
    (("tiny", "--scheduled", "2026-11-23T25:30"), "--scheduled '2026-11-23T25:30'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_the_run_would_refuse_is_refused_before_it_is_made(
    llava: Command, server: ApiServer, arguments: tuple[str, ...], message: str
) -> None:
    status, _, err = llava("submit", "--command", "train", "--root", "s3://bucket/root", *arguments)
    assert (status, message in last(err)) == (2, True), err
    assert not any(each.startswith("POST") for each in server.requests)


def test_nothing_new_makes_no_run_and_something_new_makes_one(
    llava: Command, server: ApiServer, s3_root: str
) -> None:
    incoming = f"{s3_root}/in"
    asked = ["submit", "tiny", "--command", "retrain", "--root", s3_root, "--drop", incoming, "--if-new"]
    status, out, err = llava(*asked)
    assert (status, out) == (0, "")
    assert f"nothing new under {incoming}" in err
    assert f"nothing at all lies under {incoming}" in err
    assert server.requests == ["GET llava/rayjobs/llava"]
    open_store(f"{incoming}/monday").write("data.json", b"[]")
    err = llava(*asked)[2]
    assert "still being written" in err and "nothing at all" not in err
    open_store(f"{incoming}/monday").write("_READY", b"")
    status, out, err = llava(*asked)
    assert (status, out.startswith("llava-retrain-")) == (0, True), err
    assert f"new: {incoming}/monday (2 files" in err


def test_looking_for_new_data_in_a_folder_that_is_not_there_is_refused(
    llava: Command, server: ApiServer, s3_root: str, tmp_path: Path
) -> None:
    asked = ("submit", "--command", "retrain", "--root", s3_root, "--drop", str(tmp_path / "inn"), "--if-new")
    status, out, err = llava(*asked)
    assert (status, out, f"there is no folder {tmp_path / 'inn'}" in last(err)) == (2, "", True), err
    assert server.bodies == []


def _words_of_the_schedules_pod(job: str) -> list[str]:
    """What the container of the CronJob runs in a Job of this name, as Kubernetes puts it together."""
    (cron,) = of_kind(render("base"), "CronJob")
    ((_, pod),) = pods([cron])
    (container,) = pod["containers"]
    (variable,) = container["env"]
    field = variable["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.labels['batch.kubernetes.io/job-name']"
    program, *words = [word.replace(f"$({variable['name']})", job) for word in container["command"]]
    assert program == "llava"
    return words


def test_the_documented_command_that_looks_once_submits_what_is_new(
    llava: Command, server: ApiServer, s3_root: str
) -> None:
    written = {
        found
        for path in (K8S.parent / "docs/cluster.md", K8S / "base/schedule.yaml")
        for found in re.findall(r"`kubectl -n (\S+) create job --from=cronjob/(\S+) (\S+)`", path.read_text())
    }
    ((namespace, cron_name, job),) = written
    (cron,) = of_kind(render("base"), "CronJob")
    assert (namespace, cron_name) == (cron["metadata"]["namespace"], cron["metadata"]["name"])
    template = server.jobs["llava"]
    template["spec"]["entrypoint"] = f"llava retrain tiny --root {s3_root} --drop {s3_root}/in --wait"
    for file in ("data.json", "_READY"):
        open_store(f"{s3_root}/in/monday").write(file, b"[]")
    before = datetime.datetime.now(datetime.UTC)
    status, out, err = llava(*_words_of_the_schedules_pod(job))
    after = datetime.datetime.now(datetime.UTC)
    assert status == 0, err
    name = out.strip()
    assert name in {f"llava-retrain-{moment:%Y%m%d%H%M}" for moment in (before, after)}
    # The pod is tried again in a later minute: no second run.
    run = server.jobs.pop(name)
    server.put({**run, "metadata": {**run["metadata"], "name": "llava-retrain-202301010000"}})
    status, out, err = llava(*_words_of_the_schedules_pod(job))
    assert (status, out, "llava-retrain-202301010000 is on" in last(err)) == (5, "", True)


def test_pods_get_the_memory_that_the_stages_take(llava: Command, server: ApiServer) -> None:
    """A 7B stage 2 on one pod with a GPU would be killed at its first checkpoint."""
    for_data = ("--set", "shard.path=/data", "--set", "shard_captions.path=/data")
    one = (*for_data, "--set", "pretrain.workers=1", "--set", "finetune.workers=1")
    train = ["llava-v1.5-7b" if word == "tiny" else word for word in TRAIN]
    commits = [
        part
        for which in ("vision", "language")
        for part in ("--set", f"backbones.{which}_revision={'0123456789abcdef' * 2}89abcdef")
    ]
    status, _, err = llava(*train, *one, *commits)
    assert status == 0, err
    assert "pods of group gpu: 64Gi -> 93Gi of memory, since finetune takes 79.5 GiB a rank" in err
    (body,) = server.bodies
    (group,) = [
        each for each in body["spec"]["rayClusterSpec"]["workerGroupSpecs"] if each["groupName"] == "gpu"
    ]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert {part: resources[part]["memory"] for part in resources} == {"requests": "93Gi", "limits": "93Gi"}
    (template,) = [
        each
        for each in server.jobs["llava"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        if each["groupName"] == "gpu"
    ]
    assert template["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] == "64Gi"


def test_pods_that_have_enough_memory_keep_what_the_template_gives(llava: Command, server: ApiServer) -> None:
    assert llava(*TRAIN)[0] == 0
    assert server.bodies[0]["spec"]["rayClusterSpec"] == server.jobs["llava"]["spec"]["rayClusterSpec"]


def test_ranks_of_a_smaller_group_are_not_counted_for_gpus_that_it_does_not_have() -> None:
    """On pods of eight GPUs: eight ranks with an eighth each, or two with a half each; never eight with a half."""
    sets = [
        *(f"backbones.{which}_revision={'0123456789abcdef' * 2}89abcdef" for which in ("vision", "language")),
        "shard.path=/data",
        "shard_captions.path=/data",
    ]

    def needed(*more: str) -> float:
        config = configs.load("llava-v1.5-7b", [*sets, *more])
        return max(whole for _, _, whole in estimate.host_needs(config, 8)) / 2**30

    eight, elastic, one = needed(), needed("finetune.min_workers=2"), needed("finetune.workers=1")
    assert 110 < eight < 130
    assert eight <= elastic < 1.2 * eight
    assert one < eight
