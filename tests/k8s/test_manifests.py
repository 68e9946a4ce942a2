"""Everything under k8s/ builds, fits its schemas, and holds to the policies; each policy finds what breaks it."""

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml

from llava.errors import RefusedInput
from tests.support.kubernetes import policies
from tests.support.kubernetes.policies import EVERYWHERE, images_are_digests
from tests.support.kubernetes.rendering import K8S, VARIANTS, Object, build, of_kind, pods, render
from tests.support.kubernetes.schemas import errors_of
from workflows.kubernetes import rayjob

CUSTOM = ("ray.io/", "kueue.x-k8s.io/")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_object_fits_its_schema_strictly(variant: str) -> None:
    objects = render(variant)
    assert objects
    for each in objects:
        if each["apiVersion"].startswith(CUSTOM):
            assert errors_of(each) == []
        else:
            kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)


def test_a_field_that_nobody_knows_is_refused() -> None:
    (job,) = of_kind(render("base"), "RayJob")
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = (
        "Always"
    )
    job["spec"]["retries"] = 3
    assert len(errors_of(job)) == 2
    (cron,) = of_kind(render("base"), "CronJob")
    cron["spec"]["timezone"] = "Etc/UTC"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(cron, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("policy", EVERYWHERE, ids=lambda policy: policy.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_object_holds_to_the_policy(variant: str, policy: Callable[[list[Object]], Any]) -> None:
    assert list(policy(render(variant))) == []


def test_prod_runs_images_by_digest_only() -> None:
    assert list(images_are_digests(render("prod"))) == []
    assert list(images_are_digests(render("local")))


def _pod(objects: list[Object], part: str) -> Object:
    return next(pod for place, pod in pods(objects) if part in place)


def _one(objects: list[Object], kind: str, name: str = "") -> Object:
    return next(each for each in of_kind(objects, kind) if name in each["metadata"]["name"])


def _policy(objects: list[Object], name: str) -> Object:
    spec: Object = _one(objects, "NetworkPolicy", name)["spec"]
    return spec


BREAKS: list[tuple[str, Callable[[list[Object]], Any], str]] = [
    (
        "every_pod_is_restricted",
        lambda o: _pod(o, "submitterPodTemplate").pop("securityContext"),
        "runAsNonRoot",
    ),
    (
        "every_pod_is_restricted",
        lambda o: _pod(o, "workerGroupSpecs[1]")["containers"][0].pop("securityContext"),
        "capabilities",
    ),
    (
        "every_pod_is_restricted",
        lambda o: _one(o, "RayJob")["spec"]["rayClusterSpec"]["autoscalerOptions"].pop("securityContext"),
        "autoscaler",
    ),
    ("every_pod_is_restricted", lambda o: _pod(o, "CronJob").update(hostNetwork=True), "host"),
    (
        "every_container_has_requests_and_limits",
        lambda o: _pod(o, "headGroupSpec")["containers"][0]["resources"]["limits"].pop("memory"),
        "memory",
    ),
    (
        "every_container_has_requests_and_limits",
        lambda o: _pod(o, "workerGroupSpecs[1]")["containers"][0]["resources"]["requests"].update(
            {"nvidia.com/gpu": 0}
        ),
        "overcommitted",
    ),
    (
        "no_secret_in_clear",
        lambda o: _pod(o, "headGroupSpec")["containers"][0].update(
            env=[{"name": "DB_PASSWORD", "value": "x"}]
        ),
        "DB_PASSWORD",
    ),
    ("no_secret_in_clear", lambda o: o.append({"kind": "Secret", "metadata": {"name": "x"}}), "Secret/x"),
    (
        "no_secret_in_clear",
        lambda o: _one(o, "ConfigMap")["data"].update(URI="https://me:pw@host/x"),
        "a URI with a password",
    ),
    ("rights_are_named_and_few", lambda o: _one(o, "Role")["rules"][0].update(verbs=["*"]), "wildcard"),
    (
        "rights_are_named_and_few",
        lambda o: _one(o, "Role")["rules"][0].update(resources=["secrets"]),
        "secrets",
    ),
    (
        "rights_are_named_and_few",
        lambda o: _pod(o, "workerGroupSpecs[0]").update(automountServiceAccountToken=True),
        "a token of the API server",
    ),
    (
        "every_port_is_covered",
        lambda o: o.remove(_one(o, "NetworkPolicy", "nobody-by-default")),
        "by default",
    ),
    (
        "every_port_is_covered",
        lambda o: _policy(o, "ray-dashboard")["ingress"][0].update({"from": [{"podSelector": {}}]}),
        "port 8265 is open to",
    ),
    (
        "every_port_is_covered",
        lambda o: _policy(o, "ray-dashboard")["ingress"][0]["ports"].append(
            {"protocol": "TCP", "port": 10001}
        ),
        "port 10001 is open to",
    ),
    (
        "every_port_is_covered",
        lambda o: _policy(o, "ray-nodes")["ingress"][0].pop("from"),
        "lets everybody in",
    ),
    (
        "ray_jobs_are_templates_that_kuberay_takes",
        lambda o: _one(o, "RayJob")["spec"].update(submissionMode="K8sJobmode"),
        "submissionMode K8sJobmode",
    ),
    (
        "ray_jobs_are_templates_that_kuberay_takes",
        lambda o: _one(o, "RayJob")["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "llava"}),
        "Kueue would start the template",
    ),
    (
        "ray_jobs_are_templates_that_kuberay_takes",
        lambda o: _one(o, "RayJob")["metadata"].update(name="a-name-that-is-much-too-long"),
        "no room",
    ),
    (
        "ray_jobs_are_templates_that_kuberay_takes",
        lambda o: _one(o, "RayCluster")["spec"].pop("authOptions"),
        "token authentication",
    ),
    (
        "a_run_that_is_stopped_has_time_to_save",
        lambda o: _pod(o, "RayJob/llava.spec.rayClusterSpec.headGroupSpec").pop(
            "terminationGracePeriodSeconds"
        ),
        "head: terminationGracePeriodSeconds 30",
    ),
    (
        "a_run_that_is_stopped_has_time_to_save",
        lambda o: _pod(o, "RayJob/llava.spec.rayClusterSpec.workerGroupSpecs[1]").update(
            terminationGracePeriodSeconds=60
        ),
        "gpu: terminationGracePeriodSeconds 60",
    ),
    (
        "a_run_that_is_stopped_has_time_to_save",
        lambda o: _one(o, "ConfigMap")["data"].pop("RAY_JOB_STOP_WAIT_TIME_S"),
        "RAY_JOB_STOP_WAIT_TIME_S is 3, stop_grace 60",
    ),
    (
        "a_run_that_is_stopped_has_time_to_save",
        lambda o: _one(o, "RayJob")["spec"].update(
            entrypoint="llava train tiny --set finetune.stop_grace=600"
        ),
        "stop_grace 600",
    ),
    (
        "the_schedule_never_overlaps_or_piles_up",
        lambda o: _one(o, "CronJob")["spec"].update(concurrencyPolicy="Allow"),
        "concurrencyPolicy",
    ),
    (
        "names_fit_and_references_lead_somewhere",
        lambda o: _pod(o, "headGroupSpec").update(serviceAccountName="llava-trainee"),
        "llava-trainee",
    ),
    (
        "names_fit_and_references_lead_somewhere",
        lambda o: _pod(o, "CronJob")["volumes"].pop(),
        "volume cache",
    ),
    (
        "a_queue_can_hold_what_it_is_asked_for",
        lambda o: _one(o, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"][1].update(replicas=9),
        "fits into no flavor",
    ),
    (
        "a_queue_can_hold_what_it_is_asked_for",
        lambda o: _one(o, "RayJob")["spec"]["rayClusterSpec"].update(enableInTreeAutoscaling=True),
        "no autoscaling",
    ),
    (
        "config_keys_are_known",
        lambda o: _one(o, "RayJob")["spec"].update(entrypoint="llava train tiny --set finetune.epoch=1"),
        "finetune.epoch: unknown key",
    ),
    (
        "commands_are_our_own",
        lambda o: _pod(o, "CronJob")["containers"][0]["command"].append("--soon"),
        "--soon",
    ),
    (
        "nothing_writes_where_programs_are",
        lambda o: _pod(o, "workerGroupSpecs[0]")["containers"][0]["volumeMounts"].pop(0),
        "nothing to write to at /tmp",
    ),
    (
        "nothing_writes_where_programs_are",
        lambda o: _one(o, "RayJob")["spec"]["rayClusterSpec"]["autoscalerOptions"].pop("volumeMounts"),
        "autoscaler: nothing to write to",
    ),
    (
        "secrets_go_where_they_are_needed",
        lambda o: _pod(o, "workerGroupSpecs[0]")["containers"][0]["envFrom"].append(
            {"secretRef": {"name": "llava-teacher"}}
        ),
        "cpu: llava-teacher",
    ),
    (
        "runs_are_no_administrators",
        lambda o: _pod(o, "headGroupSpec")["containers"][0]["envFrom"].append(
            {"secretRef": {"name": "llava-mlflow-server"}}
        ),
        "the administrator of MLflow",
    ),
    (
        "no_cloud_gives_credentials",
        lambda o: _policy(o, "no-credentials")["egress"][0]["to"][1]["ipBlock"]["except"].pop(),
        "192.0.0.192 (Oracle) is open",
    ),
    (
        "a_quota_holds_a_run_and_bounds_the_rest",
        lambda o: _one(o, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(maxReplicas=90),
        "requests.cpu: 64, a run and the services take",
    ),
    (
        "settings_are_read_by_somebody",
        lambda o: _one(o, "ConfigMap")["data"].update(LLAVA_CASH="/x"),
        "LLAVA_CASH",
    ),
]


@pytest.mark.parametrize(
    ("policy", "break_it", "found"), BREAKS, ids=[f"{name}: {text}" for name, _, text in BREAKS]
)
def test_a_policy_finds_what_breaks_it(
    policy: str, break_it: Callable[[list[Object]], Any], found: str
) -> None:
    objects = render("base+kueue" if "queue" in policy else "base")
    break_it(objects)
    check = next(each for each in EVERYWHERE if each.__name__ == policy)
    assert any(found in breach for breach in check(objects))


def _run_of(objects: list[Object]) -> Object:
    (template,) = of_kind(objects, "RayJob")
    entrypoint = rayjob.Entrypoint.parse(template["spec"]["entrypoint"])
    name = rayjob.run_name("llava", entrypoint, rayjob.minute_of("2026-11-23T02:30"), parallel=True)
    return rayjob.copy_of(template, name, entrypoint)


UNFILLED = [name for name in VARIANTS if name.startswith("prod") or name.endswith("irsa")]
"""Those with inputs that only the user has."""


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in UNFILLED])
def test_the_copy_of_the_template_is_a_rayjob_that_submit_takes(variant: str) -> None:
    run = _run_of(render(variant))
    rayjob.check(run)
    assert errors_of(run) == []
    queued = variant == "base+kueue"
    assert run["spec"]["suspend"] is queued
    assert ("kueue.x-k8s.io/queue-name" in run["metadata"]["labels"]) is queued


@pytest.mark.parametrize("variant", UNFILLED)
def test_what_is_shipped_with_placeholders_is_refused_for_them(variant: str) -> None:
    with pytest.raises(RefusedInput, match=r"is still a placeholder \(.*replace-me"):
        rayjob.check(_run_of(render(variant)))


PROD = K8S / "overlays" / "prod"
WORDS = [
    (path.relative_to(PROD).as_posix(), word)
    for path in sorted(PROD.rglob("*.yaml"))
    for line in path.read_text().splitlines()
    for word in line.partition("#")[0].split()
    if "replace-me" in word or "0" * 64 in word
]
"""The inputs of `prod`: the file, and the word that one stands in."""


def _prod_filled(folder: Path, *left: tuple[str, str]) -> Object:
    """The run of `prod` with its inputs filled in, all but those that are `left`."""
    shutil.copytree(K8S, folder / "k8s")
    for path in PROD.rglob("*.yaml"):
        name = path.relative_to(PROD).as_posix()
        text = policies.filled(path.read_text())
        for file, word in left:
            text = text.replace(policies.filled(word), word) if file == name else text
        (folder / "k8s/overlays/prod" / name).write_text(text)
    return _run_of(list(yaml.load_all(build(folder / "k8s/overlays/prod"), yaml.CSafeLoader)))


@pytest.mark.parametrize("left", WORDS, ids=[word[:60] for _, word in WORDS])
def test_one_input_of_prod_that_is_not_filled_in_is_enough_to_be_refused(
    tmp_path: Path, left: tuple[str, str]
) -> None:
    with pytest.raises(RefusedInput, match="is still a placeholder"):
        rayjob.check(_prod_filled(tmp_path, left))


def test_prod_with_its_inputs_filled_in_is_taken_and_a_tag_is_not(tmp_path: Path) -> None:
    run = _prod_filled(tmp_path)
    rayjob.check(run)
    tagged = copy.deepcopy(run)
    head = tagged["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["image"] = "our-own.example/llava-workflow:latest"
    with pytest.raises(RefusedInput, match="name it by its digest"):
        rayjob.check(tagged)


def test_the_inputs_of_prod_are_all_found_by_one_word() -> None:
    lines = [
        line for path in (K8S / "overlays/prod").rglob("*.yaml") for line in path.read_text().splitlines()
    ]
    left = [line for line in lines if "replace-me" not in line]
    assert [
        line for line in left if ".invalid" in line or "0" * 64 in line or re.search("s3://|_revision=", line)
    ] == []


def test_ray_reads_the_waits_that_the_settings_give() -> None:
    """Both are Ray's own names: where a release drops one, a stopped run would be killed after seconds again."""
    code = "".join(
        (Path(ray.__file__).parent / name).read_text()
        for name in ("_private/ray_constants.py", "dashboard/modules/job/job_supervisor.py")
    )
    assert [name for name in policies.STOP_WAITS if f'"{name}"' not in code] == []


def test_every_template_waits_for_the_lease_of_a_cluster_that_died() -> None:
    for variant in VARIANTS:
        (template,) = of_kind(render(variant), "RayJob")
        entrypoint = rayjob.Entrypoint.parse(template["spec"]["entrypoint"])
        changed = entrypoint.with_overrides("train", "tiny", "s3://b/r", ["s3://b/d"], ["finetune.epochs=2"])
        for one in (entrypoint, changed):
            assert str(one).split().count("--wait") == 1, variant
            policies.parse(str(one).split())


def test_the_cluster_runs_the_ray_that_is_installed_and_locked() -> None:
    locked = (K8S / "image" / "requirements.txt").read_text()
    for place, cluster in policies.ray_clusters(render("base")):
        assert cluster["rayVersion"] == ray.__version__, place
    assert f"\nray=={ray.__version__} --hash=" in locked


def test_the_session_has_the_nodes_of_the_workflow() -> None:
    for variant in ("base", "local", "prod", "prod+everything"):
        job, session = (
            dict(policies.ray_clusters(render(variant)))[at]
            for at in ("RayJob/llava", "RayCluster/llava-session")
        )
        assert {key: value for key, value in session.items() if key != "suspend"} == job, variant


def test_the_namespace_enforces_restricted_pod_security() -> None:
    labels = _one(render("base"), "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_every_secret_that_a_pod_reads_is_explained() -> None:
    documented = (K8S.parent / "docs" / "cluster.md").read_text()
    named = set(
        re.findall(r"secret(?:Key)?Ref['\"]?: \{[^}]*?'name': '([^']+)'", str([render(v) for v in VARIANTS]))
    )
    assert named >= {"llava-s3", "llava-mlflow", "llava-mlflow-server"}
    assert [name for name in named if f"`{name}`" not in documented] == []
