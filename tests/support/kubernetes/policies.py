"""What must hold for everything that is applied to the cluster: each policy lists what breaks it, with the place."""

import hashlib
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.main import get_command

from components.contract import refuse_secrets
from llava.errors import LlavaError
from tests.support.kubernetes import trust
from tests.support.kubernetes.reading import containers, quantity, ray_clusters
from tests.support.kubernetes.rendering import Object, of_kind, pod_specs, pods, strings
from tests.support.repository import REPOSITORY
from workflows import cli
from workflows import config as configs
from workflows.kubernetes.rayjob import COMMANDS, MODES, NAME_LIMIT, PRIORITY, QUEUE, Entrypoint

CODE = REPOSITORY
KUBERAY_LABELS = {"ray.io/is-ray-node": "yes", "ray.io/cluster": "any"}
RAY_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
RAY_NODES = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
SUBMITTERS = {"matchExpressions": [{"key": "ray.io/originated-from-cr-name", "operator": "Exists"}]}
STOP_WAITS = {"RAY_JOB_STOP_WAIT_TIME_S": 3, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": 30}
"""How long Ray waits before it kills a stopped job, and the processes of a node that got SIGTERM; and its defaults."""
_SECRET_NAME = re.compile(r"(password|secret|token|_key|credential)", re.I)

Breaches = Iterator[str]


def every_pod_is_restricted(objects: list[Object]) -> Breaches:
    """Pod Security `restricted`, container by container, with the autoscaler's sidecar."""
    for place, pod in pods(objects):
        above = pod.get("securityContext", {})
        if above.get("runAsNonRoot") is not True:
            yield f"{place}: runAsNonRoot"
        if above.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{place}: seccompProfile"
        if above.get("runAsUser") == 0 or any(pod.get(f"host{what}") for what in ("Network", "PID", "IPC")):
            yield f"{place}: root, or the host's network, processes or memory"
        allowed = {
            "configMap",
            "emptyDir",
            "secret",
            "persistentVolumeClaim",
            "projected",
            "downwardAPI",
            "name",
        }
        yield from (f"{place}: volume {v['name']}" for v in pod.get("volumes", []) if not set(v) <= allowed)
        for container in containers(pod):
            yield from _unrestricted(f"{place}/{container['name']}", container)
    for each, cluster in ray_clusters(objects):
        if cluster.get("enableInTreeAutoscaling"):
            yield from _unrestricted(f"{each}: autoscaler", cluster.get("autoscalerOptions", {}))


def _unrestricted(place: str, container: Object) -> Breaches:
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield f"{place}: allowPrivilegeEscalation"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{place}: capabilities"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield f"{place}: hostPort"


def every_container_has_requests_and_limits(objects: list[Object]) -> Breaches:
    """cpu and memory, both ways; memory the same or more as a limit; devices in equal number."""
    everywhere = [(f"{p}/{c['name']}", c) for p, pod in pods(objects) for c in containers(pod)]
    for each, cluster in ray_clusters(objects):
        if cluster.get("enableInTreeAutoscaling"):
            everywhere.append((f"{each}: autoscaler", cluster.get("autoscalerOptions", {})))
    for place, container in everywhere:
        asked, most = (container.get("resources", {}).get(half, {}) for half in ("requests", "limits"))
        for name in {"cpu", "memory", *asked, *most}:
            if name not in asked or name not in most or quantity(asked[name]) > quantity(most[name]):
                yield f"{place}: {name}: requests {asked.get(name)}, limits {most.get(name)}"
            elif "/" in name and asked[name] != most[name]:
                yield f"{place}: {name} cannot be overcommitted"


def no_secret_in_clear(objects: list[Object]) -> Breaches:
    """No Secret is shipped, no variable of a secret's name has a value, no text looks like a credential."""
    for each in objects:
        place = f"{each['kind']}/{each['metadata']['name']}"
        if each["kind"] == "Secret":
            yield place
        for text in strings(each):
            try:
                refuse_secrets(text, place)
            except LlavaError as error:
                yield str(error)
        if each["kind"] == "ConfigMap":
            yield from (f"{place}: {key}" for key in each["data"] if _SECRET_NAME.search(key))
            for text in each["data"].values():
                if re.search(r"password\s*=\s*\S", text, re.I):
                    yield f"{place}: a password"
    for place, pod in pods(objects):
        for container in containers(pod):
            for variable in container.get("env", []):
                if "value" in variable and _SECRET_NAME.search(variable["name"]):
                    yield f"{place}/{container['name']}: {variable['name']} has a value"


def rights_are_named_and_few(objects: list[Object]) -> Breaches:
    """No wildcard, nothing for the whole cluster, no Secrets; the submitter creates and reads RayJobs."""
    yield from (f"{each['kind']} rights" for each in of_kind(objects, "ClusterRole", "ClusterRoleBinding"))
    for role in of_kind(objects, "Role"):
        for rule in role["rules"]:
            if any("*" in value for values in rule.values() for value in values):
                yield f"Role/{role['metadata']['name']}: wildcard"
            if rule["resources"] != ["rayjobs"] or not set(rule["verbs"]) <= {
                "create",
                "get",
                "list",
                "watch",
            }:
                yield f"Role/{role['metadata']['name']}: {rule}"
    for account in of_kind(objects, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount/{account['metadata']['name']}: its token goes into every pod"
    for place, pod in pods(objects):
        may = "headGroupSpec" in place or place.startswith("CronJob/")
        if pod.get("automountServiceAccountToken") is not False and not may:
            yield f"{place}: a token of the API server that it has no use for"


def every_port_is_covered(objects: list[Object]) -> Breaches:
    """Default deny; each port of each pod is open to named pods only, those of Ray to exactly whom they serve."""
    policies = [
        np["spec"] for np in of_kind(objects, "NetworkPolicy") if "Ingress" in np["spec"]["policyTypes"]
    ]
    if {"podSelector": {}, "policyTypes": ["Ingress"]} not in policies:
        yield "no policy denies by default"
    for number, policy in enumerate(policies):
        for rule in policy.get("ingress", []):
            if not rule.get("from") or {} in rule["from"] or any("ipBlock" in peer for peer in rule["from"]):
                yield f"policy {number} on {policy['podSelector']} lets everybody in"
    for place, labels, ports in _ray_nodes(objects):
        expected = {port: [RAY_NODES] for port in ports.values()}
        if labels["ray.io/node-type"] == "head":
            yield from (f"{place}: port {name}" for name in RAY_PORTS if ports.get(name) != RAY_PORTS[name])
            expected[RAY_PORTS["dashboard"]] = sorted([RAY_NODES, SUBMITTERS, "kuberay-system"], key=str)
        for port, peers in expected.items():
            if (found := _may_reach(policies, labels, port)) != peers:
                yield f"{place}: port {port} is open to {found}"
    for each in of_kind(objects, "StatefulSet", "Deployment"):
        template = each["spec"]["template"]
        for container in containers(template["spec"]):
            for port in container.get("ports", []):
                if not _may_reach(policies, template["metadata"]["labels"], port["containerPort"]):
                    yield f"{each['kind']}/{each['metadata']['name']}: nobody reaches port {port['containerPort']}"


def _may_reach(policies: list[Object], labels: dict[str, str], port: int) -> list[Any]:
    found: list[Any] = []
    for policy in policies:
        if not _selects(policy["podSelector"], labels):
            continue
        for rule in policy.get("ingress", []):
            if "ports" in rule and port not in [each["port"] for each in rule["ports"]]:
                continue
            for peer in rule["from"]:
                space = (
                    peer.get("namespaceSelector", {})
                    .get("matchLabels", {})
                    .get("kubernetes.io/metadata.name")
                )
                found.append(space or peer["podSelector"])
    return sorted(found, key=str)


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    exact = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return exact and all(
        each["operator"] == "Exists" and each["key"] in labels
        for each in selector.get("matchExpressions", [])
    )


def _ray_nodes(objects: list[Object]) -> Iterator[tuple[str, dict[str, str], dict[str, int]]]:
    for place, cluster in ray_clusters(objects):
        for kind, group in [
            ("head", cluster["headGroupSpec"]),
            *(("worker", g) for g in cluster["workerGroupSpecs"]),
        ]:
            ports = {
                p["name"]: p["containerPort"]
                for c in group["template"]["spec"]["containers"]
                for p in c["ports"]
            }
            yield f"{place}: {kind}", KUBERAY_LABELS | {"ray.io/node-type": kind}, ports


def ray_jobs_are_templates_that_kuberay_takes(objects: list[Object]) -> Breaches:
    """Suspended, without Kueue's label, a known mode, a token, limits in time; names that leave room for a minute."""
    for job in of_kind(objects, "RayJob"):
        spec, name = job["spec"], job["metadata"]["name"]
        if spec.get("suspend") is not True or spec.get("shutdownAfterJobFinishes") is not True:
            yield f"{name}: a template stays suspended"
        if any(label.startswith("kueue.x-k8s.io/") for label in job["metadata"].get("labels", {})):
            yield f"{name}: Kueue would start the template"
        if spec.get("submissionMode") not in MODES:
            yield f"{name}: submissionMode {spec.get('submissionMode')}"
        if "submitterPodTemplate" not in spec:
            yield f"{name}: no submitterPodTemplate"
        limits = (
            "backoffLimit",
            "activeDeadlineSeconds",
            "preRunningDeadlineSeconds",
            "ttlSecondsAfterFinished",
        )
        yield from (f"{name}: no {limit}" for limit in limits if limit not in spec)
        if len(f"{name}-{max(COMMANDS, key=len)}-202611230230-abcdef") > NAME_LIMIT:
            yield f"{name}: no room for the command, the minute and a digest in {NAME_LIMIT} characters"
    for place, cluster in ray_clusters(objects):
        if cluster.get("authOptions") != {"mode": "token"}:
            yield f"{place}: token authentication is not written out"
        if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            yield f"{place}: work is placed on the head"
    for cluster in of_kind(objects, "RayCluster"):
        if cluster["spec"].get("suspend") is not True:
            yield f"{cluster['metadata']['name']}: costs nodes before anybody asks for it"


def a_run_that_is_stopped_has_time_to_save(objects: list[Object]) -> Breaches:
    """`stop_grace` of the preset < what Ray waits after SIGTERM < what the pods that train, and the head, are given."""
    settings = next(
        each["data"] for each in of_kind(objects, "ConfigMap") if "settings" in each["metadata"]["name"]
    )
    for job in of_kind(objects, "RayJob"):
        entrypoint = Entrypoint.parse(filled(job["spec"]["entrypoint"]))
        config = configs.load(entrypoint.preset, entrypoint.sets)
        saves = max(config.pretrain.stop_grace, config.finetune.stop_grace)
        waits = {name: float(settings.get(name, least)) for name, least in STOP_WAITS.items()}
        yield from (
            f"{name} is {wait:g}, stop_grace {saves:g}" for name, wait in waits.items() if wait <= saves
        )
        cluster = job["spec"]["rayClusterSpec"]
        groups = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
        training = {
            name: pod for name, pod in groups.items() if any(map(_has_gpus, containers(pod)))
        } or groups
        for name, pod in {"head": cluster["headGroupSpec"]["template"]["spec"], **training}.items():
            if (given := pod.get("terminationGracePeriodSeconds", 30)) <= max(waits.values()):
                yield f"{name}: terminationGracePeriodSeconds {given}, Ray waits {max(waits.values()):g}"


def _has_gpus(container: Object) -> bool:
    return quantity(container["resources"]["limits"].get("nvidia.com/gpu", 0)) > 0


def the_schedule_never_overlaps_or_piles_up(objects: list[Object]) -> Breaches:
    """Forbid, a time zone, a deadline to start, and a name short enough for its Jobs."""
    for cron in of_kind(objects, "CronJob"):
        spec, name = cron["spec"], cron["metadata"]["name"]
        if spec.get("concurrencyPolicy") != "Forbid" or "timeZone" not in spec:
            yield f"{name}: concurrencyPolicy, timeZone"
        if (
            "startingDeadlineSeconds" not in spec
            or "activeDeadlineSeconds" not in spec["jobTemplate"]["spec"]
        ):
            yield f"{name}: deadlines"
        if len(name) > 52:
            yield f"{name}: {len(name)} characters"


def names_fit_and_references_lead_somewhere(objects: list[Object]) -> Breaches:
    """DNS labels of at most 63 characters in the one namespace; what a pod refers to is shipped, or a Secret."""
    names = {(each["kind"], each["metadata"]["name"]) for each in objects}
    whole_cluster = ("Namespace", "PriorityClass", "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass")
    for each in objects:
        name = each["metadata"]["name"]
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
            yield f"{each['kind']}/{name}: no DNS label of at most 63 characters"
        if each["kind"] not in whole_cluster and each["metadata"].get("namespace") != "llava":
            yield f"{each['kind']}/{name}: not in the namespace llava"
    for place, pod in pods(objects):
        wanted = [
            ("ServiceAccount", pod.get("serviceAccountName")),
            ("PriorityClass", pod.get("priorityClassName")),
        ]
        wanted += [
            ("ConfigMap", _unless_optional(volume.get("configMap"))) for volume in pod.get("volumes", [])
        ]
        for container in containers(pod):
            wanted += [
                ("ConfigMap", _unless_optional(e.get("configMapRef"))) for e in container.get("envFrom", [])
            ]
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            there = {volume["name"] for volume in pod.get("volumes", [])} | {"data"}
            yield from (f"{place}: volume {name}" for name in mounted - there)
        yield from (f"{place}: {kind} {name}" for kind, name in wanted if name and (kind, name) not in names)


def _unless_optional(reference: Object | None) -> str | None:
    return reference["name"] if reference and not reference.get("optional") else None


def a_queue_can_hold_what_it_is_asked_for(objects: list[Object]) -> Breaches:
    """With Kueue: no autoscaling, fixed replicas, and each pod fits into a flavor, all together into the quota."""
    for job in of_kind(objects, "RayJob"):
        if QUEUE not in job["metadata"].get("annotations", {}):
            continue
        annotations, cluster = job["metadata"]["annotations"], job["spec"]["rayClusterSpec"]
        wanted = {("LocalQueue", annotations[QUEUE]), ("WorkloadPriorityClass", annotations[PRIORITY])}
        yield from (f"no {name}" for name in wanted - {(e["kind"], e["metadata"]["name"]) for e in objects})
        if cluster.get("enableInTreeAutoscaling"):
            yield "Kueue takes no autoscaling cluster"
        (queue,) = of_kind(objects, "ClusterQueue")
        (group,) = queue["spec"]["resourceGroups"]
        left = [{r["name"]: quantity(r["nominalQuota"]) for r in f["resources"]} for f in group["flavors"]]
        for pod_set in _pod_sets(job):
            flavor = next(
                (f for f in left if all(f.get(n, -1) >= amount for n, amount in pod_set.items())), None
            )
            if flavor is None:
                yield f"{pod_set} fits into no flavor of {left}"
                continue
            for name, amount in pod_set.items():
                flavor[name] -= amount
        for group_spec in cluster["workerGroupSpecs"]:
            if len({group_spec[bound] for bound in ("replicas", "minReplicas", "maxReplicas")}) > 1:
                yield f"group {group_spec['groupName']}: replicas are not fixed"


def _pod_sets(job: Object) -> Iterator[dict[str, float]]:
    spec = job["spec"]["rayClusterSpec"]
    groups = [(1, job["spec"]["submitterPodTemplate"]), (1, spec["headGroupSpec"]["template"])]
    for count, template in [*groups, *((g["replicas"], g["template"]) for g in spec["workerGroupSpecs"])]:
        total: dict[str, float] = {}
        for container in containers(template["spec"]):
            for name, amount in container["resources"]["requests"].items():
                total[name] = total.get(name, 0) + count * quantity(amount)
        yield total


def filled(text: str) -> str:
    """`text` with something plausible in the place of every input that the user must give."""
    text = re.sub(r"(_revision=)replace-me", r"\g<1>" + hashlib.sha1(b"a commit").hexdigest(), text)
    return text.replace("sha256:" + "0" * 64, "sha256:" + "ab" * 32).replace("replace-me", "our-own")


def commands_are_our_own(objects: list[Object]) -> Breaches:
    """Every `llava ...` of a manifest parses."""
    for words in llava_commands(objects):
        try:
            parse(words)
        except Exception as error:
            yield f"{' '.join(words)}: {error}"


def config_keys_are_known(objects: list[Object]) -> Breaches:
    """The preset and the `--set` keys of every entrypoint load, once the user's inputs are filled in."""
    for words in llava_commands(objects):
        if words[1] in COMMANDS:
            entrypoint = Entrypoint.parse(filled(shlex.join(words)))
            try:
                configs.load(entrypoint.preset, entrypoint.sets)
            except LlavaError as error:
                yield f"{entrypoint}: {error}"


def parse(words: list[str]) -> str:
    """The name of our command that takes `words`; raises where none does. Nothing is run."""
    group = get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    command = group.commands.get(words[1])
    if command is None:
        raise LookupError(f"there is no command {words[1]}")
    return str(command.make_context(words[1], words[2:]).info_name)


def llava_commands(objects: list[Object]) -> list[list[str]]:
    """The words of every `llava` command in entrypoints and containers."""
    found = [shlex.split(job["spec"]["entrypoint"]) for job in of_kind(objects, "RayJob")]
    for each in objects:
        for _, pod in pod_specs(each):
            found += [c["command"] + c.get("args", []) for c in containers(pod) if "command" in c]
    return [words for words in found if words[0] == "llava"]


def settings_are_read_by_somebody(objects: list[Object]) -> Breaches:
    """Each LLAVA_ variable of a manifest stands in our code."""
    code = "\n".join(
        path.read_text()
        for folder in ("llava", "components", "workflows")
        for path in (CODE / folder).rglob("*.py")
    )
    names = {key for each in of_kind(objects, "ConfigMap") for key in each["data"]}
    for _, pod in pods(objects):
        names |= {variable["name"] for c in containers(pod) for variable in c.get("env", [])}
    yield from (name for name in names if name.startswith("LLAVA_") and f'"{name}"' not in code)


def images_are_digests(objects: list[Object]) -> Breaches:
    """For clusters that matter: what runs is what was looked at."""
    for place, pod in pods(objects):
        for container in containers(pod):
            if not re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", container["image"]):
                yield f"{place}/{container['name']}: {container['image']}"


EVERYWHERE: list[Callable[[list[Object]], Breaches]] = [
    every_pod_is_restricted,
    every_container_has_requests_and_limits,
    no_secret_in_clear,
    rights_are_named_and_few,
    every_port_is_covered,
    ray_jobs_are_templates_that_kuberay_takes,
    a_run_that_is_stopped_has_time_to_save,
    the_schedule_never_overlaps_or_piles_up,
    names_fit_and_references_lead_somewhere,
    a_queue_can_hold_what_it_is_asked_for,
    commands_are_our_own,
    config_keys_are_known,
    settings_are_read_by_somebody,
    *trust.TRUST,
]
