"""Parts of manifests, read the same way by every policy."""

import re
from collections.abc import Iterator
from typing import Any

from tests.support.kubernetes.rendering import Object, of_kind

_UNITS = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "": 1}


def ray_clusters(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Every Ray cluster's spec, of RayJobs and RayClusters, with its place."""
    for each in of_kind(objects, "RayJob", "RayCluster"):
        yield f"{each['kind']}/{each['metadata']['name']}", each["spec"].get("rayClusterSpec", each["spec"])


def quantity(value: Any) -> float:
    """Kubernetes' 500m, 8Gi, 4 as a number."""
    number, unit = re.fullmatch(r"([\d.]+)(m|[KMG]i|)", str(value)).groups()  # type: ignore[union-attr]
    return float(number) * _UNITS[unit]


def containers(pod: Object) -> list[Object]:
    """All of them, the first ones included."""
    return [*pod.get("initContainers", []), *pod["containers"]]
