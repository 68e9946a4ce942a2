"""What kustomize makes of k8s/: base, every overlay, every component on base, and all optional ones together."""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.repository import REPOSITORY

K8S = REPOSITORY / "k8s"
KUBECTL = Path(sys.executable).parent / "kubectl"
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
EVERYTHING = [
    "overlays/prod/nodes",
    *(f"components/{name}" for name in ("kueue", "spot", "irsa", "efa", "session")),
]

VARIANTS: dict[str, tuple[str, list[str]]] = {
    "base": ("base", []),
    **{name: (f"overlays/{name}", []) for name in OVERLAYS},
    **{f"base+{name}": ("base", [f"components/{name}"]) for name in COMPONENTS},
    "prod+everything": ("base", EVERYTHING),
    "prod+services": ("overlays/prod", ["components/s3", "components/mlflow"]),
}
"""Name -> what is built, and the components on it; paths inside k8s/."""

Object = dict[str, Any]


@functools.cache
def _built(variant: str) -> str:
    resource, components = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder).resolve()
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(K8S / resource, here)],
            "components": [os.path.relpath(K8S / component, here) for component in components],
        }
        (here / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return build(K8S / resource if not components else here)


def build(folder: Path) -> str:
    """The YAML that `kubectl kustomize` prints for `folder`."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(variant: str) -> list[Object]:
    """The objects of a variant, fresh ones at each call."""
    return [each for each in yaml.load_all(_built(variant), yaml.CSafeLoader) if each]


def pod_specs(value: Any, path: str = "") -> Iterator[tuple[str, Object]]:
    """Every pod's spec in an object, wherever it stands, with its path."""
    if isinstance(value, dict):
        if isinstance(value.get("containers"), list):
            yield path, value
        for key, inner in value.items():
            yield from pod_specs(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from pod_specs(inner, f"{path}[{number}]")


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Every pod's spec of all objects, named by kind, name and path."""
    for each in objects:
        yield from pod_specs(each, f"{each['kind']}/{each['metadata']['name']}")


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    """The objects of these kinds."""
    return [each for each in objects if each["kind"] in kinds]


def strings(value: Any) -> Iterator[str]:
    """Every text in an object."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)
