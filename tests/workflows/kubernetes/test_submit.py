"""`llava submit` through the real client against a server that answers as the Kubernetes API server does."""

import datetime
import ipaddress
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.contract import open_store
from llava.errors import RefusedInput
from tests.support.kubernetes.api_server import TOKEN, ApiServer, Fault, serve
from tests.support.kubernetes.rendering import K8S, of_kind, pods, render
from workflows import cli
from workflows.kubernetes import api, follow, rayjob
from workflows.kubernetes.api import Cluster
from workflows.kubernetes.submit import Request, submit

NAME = "llava-train-202611230230"
TRAIN = (
    "submit",
    "tiny",
    "--command",
    "train",
    "--root",
    "s3://bucket/root",
    "--scheduled",
    "2026-11-23T02:30",
)
ORDER = ["GET llava/rayjobs/llava", "LIST llava/rayjobs", "POST llava/rayjobs"]

Command = Callable[..., tuple[int, str, str]]


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


def last(err: str) -> str:
    return err.strip().splitlines()[-1]


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


FAILURES: list[tuple[str, list[Fault], int, tuple[str, ...]]] = [
    (
        "POST",
        [Fault(403, "exceeded quota: gpus")],
        1,
        ("forbidden (403)", "exceeded quota: gpus", "llava-submitter"),
    ),
    ("LIST", [Fault(403, "cannot list rayjobs")], 1, ("forbidden (403)", "cannot list rayjobs")),
    (
        "GET",
        [Fault(404, "not found")],
        2,
        ("RayJob llava in namespace llava", "there is none (404)", "apply -k"),
    ),
    ("GET", [Fault(404, plain=True)], 2, ("knows no RayJobs (404)", "KubeRay operator")),
    ("GET", [Fault(401)], 1, ("does not know who asks (401)", "--context")),
    (
        "POST",
        [Fault(422, "spec.foo: Invalid value")],
        2,
        ("refused by the API server (422)", "spec.foo", "k8s/"),
    ),
    (
        "POST",
        [Fault(400, "strict decoding error")],
        2,
        ("refused by the API server (400)", "strict decoding"),
    ),
    (
        "POST",
        [Fault(500, "etcd is away")] * 9,
        1,
        ("failed (500, tried 4 times)", "etcd is away", "not submitted twice"),
    ),
    (
        "LIST",
        [Fault(503, "apiserver not ready")] * 9,
        1,
        ("failed (503, tried 4 times)", "apiserver not ready"),
    ),
]


@pytest.mark.parametrize(
    ("kind", "faults", "expected", "texts"),
    FAILURES,
    ids=[f"{f[0]} {f[1][0].status} {f[3][0]}" for f in FAILURES],
)
def test_what_the_server_refuses_is_one_line_with_the_way_out(
    llava: Command, server: ApiServer, kind: str, faults: list[Fault], expected: int, texts: tuple[str, ...]
) -> None:
    server.fail(kind, *faults)
    status, out, err = llava(*TRAIN)
    assert (status, out) == (expected, "")
    assert last(err).startswith("error: ")
    assert [text for text in texts if text not in last(err)] == []
    assert "Traceback" not in err and TOKEN not in err
    assert set(server.jobs) == {"llava"}


@pytest.mark.parametrize("kind", ["GET", "LIST", "POST"])
def test_a_failure_that_passes_is_tried_again(llava: Command, server: ApiServer, kind: str) -> None:
    server.fail(kind, Fault(500), Fault(503))
    status, out, err = llava(*TRAIN)
    assert (status, out.strip()) == (0, NAME), err
    assert sum(each.startswith(f"{kind} ") for each in server.requests) == 3


def test_an_answer_that_came_too_late_does_not_make_two_runs(
    llava: Command, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "READ_S", 0.3)
    server.fail("POST", Fault(0, seconds=0.6))  # created, answered after the client has hung up
    status, out, err = llava(*TRAIN)
    assert (status, out.strip()) == (0, NAME), err
    assert set(server.jobs) == {"llava", NAME}


def test_a_server_that_never_answers_is_one_line_within_the_time_limits(
    llava: Command, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "READ_S", 0.2)
    server.fail("GET", *[Fault(200, seconds=1)] * 4)
    status, _, err = llava(*TRAIN)
    assert (status, "no answer from the API server" in last(err), server.url in last(err)) == (1, True, True)


def test_a_server_that_is_not_there_is_one_line(llava: Command, kubeconfig: Path, server: ApiServer) -> None:
    kubeconfig.write_text(kubeconfig.read_text().replace(server.url, "http://127.0.0.1:9"))
    status, _, err = llava(*TRAIN)
    assert (status, "no answer from the API server http://127.0.0.1:9" in last(err)) == (1, True)


def test_without_a_cluster_the_way_out_is_named(llava: Command, kubeconfig: Path) -> None:
    kubeconfig.unlink()
    status, _, err = llava(*TRAIN)
    assert (status, "set KUBECONFIG, give --context, or run inside a pod" in last(err)) == (2, True)


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


@pytest.mark.parametrize("job", ["now", "2nd-look", "look-20261123", "look-7"])
def test_a_job_that_is_named_by_hand_means_now(job: str) -> None:
    before = datetime.datetime.now(datetime.UTC)
    assert before <= rayjob.minute_of(f"job/{job}") <= datetime.datetime.now(datetime.UTC)


def _follow(llava: Command, act: Callable[[], None]) -> tuple[int, str, str]:
    actor = threading.Thread(target=act)
    actor.start()
    try:
        return llava(*TRAIN, "--watch")
    finally:
        actor.join(30)


def test_watch_tells_states_and_log_over_cut_streams(llava: Command, server: ApiServer) -> None:
    lines = [f"2026-11-23T02:31:{n // 2:02d}.000000000Z shard: line {n}" for n in range(12)]

    def act() -> None:
        assert server.watched.acquire(timeout=20)
        server.set_status(NAME, jobDeploymentStatus="Initializing")
        server.pods["submitter"] = lines
        server.pod_labels["submitter"] = {"batch.kubernetes.io/job-name": NAME}
        server.lines_before_a_cut = 5
        server.cut_watches()
        # Missed by the watch that was cut: seen when the object is read again.
        server.set_status(NAME, jobDeploymentStatus="Running", jobStatus="RUNNING")
        assert server.watched.acquire(timeout=20)
        server.fail("GET", Fault(503))
        server.cut_watches()
        assert server.watched.acquire(timeout=20)
        server.set_status(NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")

    status, out, err = _follow(llava, act)
    assert status == 0, err
    printed = [line for line in out.splitlines() if line.startswith("shard")]
    assert printed == [f"shard: line {n}" for n in range(12)]
    assert f"{NAME}: Running, RUNNING" in err
    assert f"{NAME}: Complete, SUCCEEDED" in err
    assert sum(each.startswith("WATCH") for each in server.requests) == 3


@pytest.mark.parametrize(
    ("message", "expected"), [("exit code 2, last logs", 2), ("exit code 4", 4), ("out of memory", 1)]
)
def test_watch_ends_with_the_runs_own_status(
    llava: Command, server: ApiServer, message: str, expected: int
) -> None:
    def act() -> None:
        assert server.watched.acquire(timeout=20)
        server.set_status(NAME, jobDeploymentStatus="Failed", jobStatus="FAILED", message=message)

    status, _, err = _follow(llava, act)
    assert (status, message in last(err)) == (expected, True)


def test_watch_of_a_run_that_somebody_deletes_says_so(llava: Command, server: ApiServer) -> None:
    def act() -> None:
        assert server.watched.acquire(timeout=20)
        server.delete(NAME)

    status, _, err = _follow(llava, act)
    assert (status, "deleted while it was" in last(err)) == (1, True)


def test_watch_without_the_right_to_read_logs_still_tells_states(llava: Command, server: ApiServer) -> None:
    def act() -> None:
        assert server.watched.acquire(timeout=20)
        server.pods["submitter"] = ["2026-11-23T02:31:00Z hello"]
        server.pod_labels["submitter"] = {"batch.kubernetes.io/job-name": NAME}
        server.fail("LOG", *[Fault(403, "cannot get pods/log")] * 9)
        threading.Event().wait(0.3)
        server.set_status(NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")

    status, _, err = _follow(llava, act)
    assert status == 0, err
    assert err.count("no log: ") == 1 and "cannot get pods/log" in err


def test_inside_a_pod_the_service_account_is_used(
    llava: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes.config import incluster_config

    certificate = _certificate(tmp_path)
    (tmp_path / "token").write_text(TOKEN)
    with serve(certificate) as inside:
        (template,) = of_kind(render("base"), "RayJob")
        inside.put(template)
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", inside.url.rpartition(":")[2])
        monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
        monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(certificate[0]))
        status, out, err = llava(*TRAIN)
        assert (status, out.strip()) == (0, NAME), err
        assert inside.requests == ORDER


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, as files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encoding = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(*encoding))
    return paths


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
