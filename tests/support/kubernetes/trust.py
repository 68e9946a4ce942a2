"""What a pod may do that runs an attacker's code: which Secrets, which addresses, how much, where it writes."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any

from tests.support.kubernetes.reading import containers, quantity, ray_clusters
from tests.support.kubernetes.rendering import Object, of_kind, pods

Breaches = Iterator[str]

ADDRESSES = {
    "169.254.169.254": "AWS, Azure, Google, OpenStack, DigitalOcean",
    "169.254.170.2": "AWS ECS",
    "169.254.170.23": "AWS EKS pod identity",
    "169.254.42.42": "Scaleway",
    "169.254.0.23": "Tencent",
    "168.63.129.16": "Azure's agent",
    "100.100.100.200": "Alibaba",
    "192.0.0.192": "Oracle",
    "fd00:ec2::254": "AWS",
    "fd00:ec2::23": "AWS EKS pod identity",
    "fd20:ce::254": "Google",
    "fe80::a9fe:a9fe": "OpenStack",
    "fd00:c1::a9fe:a9fe": "Oracle",
    "fd00:42::42": "Scaleway",
}
"""Where clouds keep credentials of nodes and pods, by who does."""
WEB = (80, 443, 8080, 32526)
"""The last: Azure's agent."""

NEEDS = {
    "headGroupSpec": {"llava-s3", "llava-mlflow", "llava-hub", "llava-teacher"},
    "gpu": {"llava-s3", "llava-mlflow"},
    "cpu": {"llava-s3"},
    "submitterPodTemplate": set[str](),
    "CronJob": {"llava-s3"},
}
"""Secrets that a pod of the workflow may read: those that code in it uses."""
WRITABLE = ("emptyDir", "persistentVolumeClaim")


def nothing_writes_where_programs_are(objects: list[Object]) -> Breaches:
    """A read-only file system in every container, and /tmp in a volume; the autoscaler, too."""
    for place, pod in pods(objects):
        volumes = {v["name"] for v in pod.get("volumes", []) if set(v) & set(WRITABLE)}
        for container in containers(pod):
            yield from _writes(f"{place}/{container['name']}", container, volumes)
    for place, cluster in ray_clusters(objects):
        if cluster.get("enableInTreeAutoscaling"):
            head = cluster["headGroupSpec"]["template"]["spec"]
            volumes = {v["name"] for v in head["volumes"] if set(v) & set(WRITABLE)}
            yield from _writes(f"{place}: autoscaler", cluster.get("autoscalerOptions", {}), volumes)


def _writes(place: str, container: Object, volumes: set[str]) -> Breaches:
    if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
        yield f"{place}: readOnlyRootFilesystem"
    if not any(m["mountPath"] == "/tmp" and m["name"] in volumes for m in container.get("volumeMounts", [])):
        yield f"{place}: nothing to write to at /tmp"


def secrets_go_where_they_are_needed(objects: list[Object]) -> Breaches:
    """Every Secret of every pod of the workflow is one that its code uses; workers that decode pictures have few."""
    for place, cluster in ray_clusters(objects):
        yield from _too_many(f"{place}: head", NEEDS["headGroupSpec"], cluster["headGroupSpec"]["template"])
        gpus = any(group["groupName"] == "gpu" for group in cluster["workerGroupSpecs"])
        for group in cluster["workerGroupSpecs"]:
            # Without GPUs the CPU workers train, and log what they do.
            needs = NEEDS[group["groupName"]] if gpus else NEEDS["gpu"]
            yield from _too_many(f"{place}: {group['groupName']}", needs, group["template"])
    for place, pod in pods(objects):
        for part in ("submitterPodTemplate", "CronJob"):
            if part in place:
                yield from _too_many(place, NEEDS[part], {"spec": pod})


def _too_many(place: str, needs: set[str], template: Object) -> Breaches:
    yield from (f"{place}: {name}" for name in sorted(secrets_of(template["spec"]) - needs))


def secrets_of(pod: Object) -> set[str]:
    """The names of all Secrets that a pod reads, from variables or volumes."""
    found = {v["secret"]["secretName"] for v in pod.get("volumes", []) if "secret" in v}
    for container in containers(pod):
        found |= {e["secretRef"]["name"] for e in container.get("envFrom", []) if "secretRef" in e}
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                found.add(reference["name"])
    return found


def runs_are_no_administrators(objects: list[Object]) -> Breaches:
    """The word of MLflow's administrator is in no pod that runs the workflow."""
    for place, pod in pods(objects):
        if place.startswith(("RayJob", "RayCluster", "CronJob")) and "llava-mlflow-server" in secrets_of(pod):
            yield f"{place}: the administrator of MLflow"


def no_cloud_gives_credentials(objects: list[Object]) -> Breaches:
    """No pod reaches an address where a cloud keeps credentials; names may be asked for there, on port 53."""
    rules = [
        rule
        for each in of_kind(objects, "NetworkPolicy")
        if "Egress" in each["spec"]["policyTypes"]
        for rule in each["spec"].get("egress", [])
    ]
    if not any(
        each["spec"]["podSelector"] == {} and "Egress" in each["spec"]["policyTypes"]
        for each in of_kind(objects, "NetworkPolicy")
    ):
        yield "no policy bounds where every pod may connect to"
    for address, cloud in ADDRESSES.items():
        if any(_lets_out(rule, address, port) for rule in rules for port in WEB):
            yield f"{address} ({cloud}) is open"
    if not any(_lets_out(rule, "169.254.20.10", 53) for rule in rules):
        yield "the resolver of a node (169.254.20.10) is closed"


def _lets_out(rule: Object, address: str, port: int) -> bool:
    if "ports" in rule and port not in [each["port"] for each in rule["ports"]]:
        return False
    if not rule.get("to"):
        return True
    return any(_holds(peer["ipBlock"], address) for peer in rule["to"] if "ipBlock" in peer)


def _holds(block: Object, address: str) -> bool:
    one = ipaddress.ip_address(address)
    ranges = [ipaddress.ip_network(text) for text in (block["cidr"], *block.get("except", []))]
    inside = [one in each for each in ranges if each.version == one.version]
    return bool(inside) and inside[0] and not any(inside[1:])


def a_quota_holds_a_run_and_bounds_the_rest(objects: list[Object]) -> Breaches:
    """One run with all its workers and every service fit; nobody opens a port of a node."""
    quotas = of_kind(objects, "ResourceQuota")
    if not quotas:
        yield "no ResourceQuota"
        return
    hard = quotas[0]["spec"]["hard"]
    yield from (f"{name}: {hard.get(name)}" for name in ("services.nodeports", "services.loadbalancers")
                if hard.get(name) != "0")  # fmt: skip
    for name, most in _at_most(objects).items():
        if name in hard and quantity(hard[name]) < most:
            yield f"{name}: {hard[name]}, a run and the services take {most:g}"
    yield from (f"no bound on {name}" for name in ("pods", "requests.cpu", "requests.memory", "limits.memory",
                                                    "requests.nvidia.com/gpu") if name not in hard)  # fmt: skip


def _at_most(objects: list[Object]) -> dict[str, float]:
    total: dict[str, float] = {"pods": 0}
    for count, pod, extra in _counted(objects):
        total["pods"] += count
        for container in [*containers(pod), *extra]:
            for half in ("requests", "limits"):
                for name, amount in container["resources"][half].items():
                    total[f"{half}.{name}"] = total.get(f"{half}.{name}", 0) + count * quantity(amount)
    return total


def _counted(objects: list[Object]) -> Iterator[tuple[int, Object, list[Any]]]:
    for each in of_kind(objects, "RayJob"):
        cluster = each["spec"]["rayClusterSpec"]
        beside = [cluster["autoscalerOptions"]] if cluster.get("enableInTreeAutoscaling") else []
        yield 1, each["spec"]["submitterPodTemplate"]["spec"], []
        yield 1, cluster["headGroupSpec"]["template"]["spec"], beside
        for group in cluster["workerGroupSpecs"]:
            yield group["maxReplicas"], group["template"]["spec"], []
    for each in of_kind(objects, "Deployment", "StatefulSet"):
        yield each["spec"]["replicas"], each["spec"]["template"]["spec"], []
    for each in of_kind(objects, "CronJob"):
        yield 1, each["spec"]["jobTemplate"]["spec"]["template"]["spec"], []


TRUST = [
    nothing_writes_where_programs_are,
    secrets_go_where_they_are_needed,
    runs_are_no_administrators,
    no_cloud_gives_credentials,
    a_quota_holds_a_run_and_bounds_the_rest,
]
