"""Memory of the pods with GPUs: as much as the run's training stages take, where the template gives them less.

A pod that is short of it is killed at its first checkpoint, hours after the start.
"""

import math
import re
from typing import Any

from llava.errors import LlavaError, RefusedInput
from llava.estimate import GIB
from workflows import estimate
from workflows.config import WorkflowConfig

_GPU = "nvidia.com/gpu"
_UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)([kMGT]i?|Ki)?")


def give_memory(job: dict[str, Any], config: WorkflowConfig) -> list[str]:
    """Raise the memory of `job`'s pods with GPUs to what `config` needs; a line for each group that was raised.

    Nothing is changed for a model whose shapes are not known before it is fetched; the line says so.
    """
    told = []
    for group in (job["spec"].get("rayClusterSpec") or {}).get("workerGroupSpecs") or []:
        for container in group["template"]["spec"]["containers"][:1]:
            resources = container.get("resources") or {}
            given = resources.get("limits") or {}
            if not (gpus := int(given.get(_GPU, 0))) or "memory" not in given:
                continue
            try:
                needs = list(estimate.host_needs(config, gpus))
            except LlavaError as error:
                return [f"pod memory was not checked: {error}"]
            if not needs:
                continue
            stage, host, whole = max(needs, key=lambda need: need[2])
            wanted = math.ceil(whole / GIB)
            if wanted * GIB > _bytes(str(given["memory"])):
                told.append(
                    f"pods of group {group['groupName']}: {given['memory']} -> {wanted}Gi of memory, since {stage} "
                    f"takes {host.rank / GIB:.1f} GiB a rank at its peak and {host.mapped / GIB:.1f} GiB for the model"
                )
                for part in ("requests", "limits"):
                    resources.setdefault(part, {})["memory"] = f"{wanted}Gi"
    return told


def _bytes(quantity: str) -> float:
    if (found := _QUANTITY.fullmatch(quantity)) is None:
        raise RefusedInput(f"memory {quantity!r} in the template: write it as 64Gi")
    return float(found[1]) * _UNITS[found[2] or ""]
