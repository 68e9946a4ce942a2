"""The Kubernetes API, as far as a run needs it: RayJobs of one namespace, and the log of the pod that submits.

Every failure is one line with the way out. What may pass (429, 5xx, a slow or absent server) is tried again: to
create is safe to repeat, since a RayJob's name is its own and is taken once.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import urllib3

from llava.errors import LlavaError, RefusedInput

CONNECT_S, READ_S = 5.0, 20.0
TRIES = 4
PAUSE_S = 1.0
WATCH_S = 300
PASSING = (429, 500, 502, 503, 504)

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
RayJob = dict[str, Any]


class ClusterError(LlavaError):
    """The cluster did not do what it was asked; the message says what, where and what to do."""


class Disconnected(ClusterError):
    """The server did not answer, or stopped in the middle of an answer."""


class _Taken(ClusterError):
    """Another object has this name."""


ANSWERS: dict[Any, tuple[type[LlavaError], str]] = {
    400: (
        RefusedInput,
        "refused by the API server (400): {said}; correct the template in k8s/ and apply it again",
    ),
    401: (
        ClusterError,
        "the API server {host} does not know who asks (401): log in again, or give --context",
    ),
    403: (
        ClusterError,
        "forbidden (403): {said}; a submitter needs the Role llava-submitter of k8s/base/access.yaml: ask for a "
        "binding to it, or free the quota that is named",
    ),
    404: (
        RefusedInput,
        "the API server {host} knows no RayJobs (404): install the KubeRay operator (docs/cluster.md)",
    ),
    "missing": (
        RefusedInput,
        "there is none (404): `kubectl apply -k k8s/overlays/...` makes the template; --template and --namespace "
        "name another one",
    ),
    409: (_Taken, "its name is taken (409)"),
    422: (
        RefusedInput,
        "refused by the API server (422): {said}; correct the template in k8s/ and apply it again",
    ),
    500: (
        ClusterError,
        "the API server {host} failed ({status}, tried {tried} times): {said}; give the same command again: what "
        "was submitted is not submitted twice",
    ),
}
"""What each answer means, and the way out."""


class Cluster:
    """RayJobs of `namespace`, reached with the pod's service account, else with the kubeconfig's `context`."""

    def __init__(self, namespace: str, context: str | None = None) -> None:
        client, configuration = _configure(context)
        # Trying again is decided here, where it is known what may be repeated.
        configuration.retries = False
        self.namespace, self.host = namespace, configuration.host
        connection = client.ApiClient(configuration)
        self._custom, self._core = client.CustomObjectsApi(connection), client.CoreV1Api(connection)
        self._failed = client.ApiException

    def get(self, name: str) -> RayJob:
        """The RayJob `name`; RefusedInput where there is none."""
        api = self._custom.get_namespaced_custom_object
        found: RayJob = self._ask(f"RayJob {name}", lambda **kw: api(*self._place, name, **kw))
        return found

    def find(self, label: str) -> list[RayJob]:
        """RayJobs that carry `label` (written key=value)."""
        api = self._custom.list_namespaced_custom_object
        found = self._ask("the list of RayJobs", lambda **kw: api(*self._place, label_selector=label, **kw))
        return list(found["items"])

    def create(self, job: RayJob) -> bool:
        """Create `job`; False where its name is taken (409)."""
        api = self._custom.create_namespaced_custom_object
        what = f"RayJob {job['metadata']['name']}"
        try:
            self._ask(what, lambda **kw: api(*self._place, job, **kw))
        except _Taken:
            return False
        return True

    def watch(self, name: str, version: str) -> Iterator[RayJob]:
        """The RayJob `name` after each change since `version`, until the server ends the stream.

        A deleted one has the key `deleted`. Raises Disconnected where the stream is cut.
        """
        api = self._custom.list_namespaced_custom_object
        stream = self._stream(
            lambda **kw: api(
                *self._place,
                field_selector=f"metadata.name={name}",
                resource_version=version,
                watch=True,
                timeout_seconds=WATCH_S,
                **kw,
            ),
            f"RayJob {name}",
            WATCH_S + READ_S,
        )
        for line in stream:
            try:
                event = json.loads(line)
            except ValueError:
                raise Disconnected(f"RayJob {name}: the watch ended in the middle of an event") from None
            if event["type"] == "ERROR":
                raise Disconnected(f"RayJob {name}: {event['object'].get('message')}")
            if event["type"] in ("ADDED", "MODIFIED", "DELETED"):
                job = event["object"]
                yield job if event["type"] != "DELETED" else {**job, "deleted": True}

    def submitter_pods(self, name: str) -> list[str]:
        """Names of the pods that hand in the run of RayJob `name` and print its log, oldest first."""
        label = f"batch.kubernetes.io/job-name={name}"
        api = self._core.list_namespaced_pod
        found = self._ask("the list of pods", lambda **kw: api(self.namespace, label_selector=label, **kw))
        pods = sorted(found.items, key=lambda pod: pod.metadata.creation_timestamp)
        return [pod.metadata.name for pod in pods]

    def log(self, pod: str) -> Iterator[tuple[str, str]]:
        """(time, line) of what `pod` prints, from its start until it ends."""
        api = self._core.read_namespaced_pod_log
        call = lambda **kw: api(pod, self.namespace, follow=True, timestamps=True, **kw)  # noqa: E731
        for line in self._stream(call, f"the log of pod {pod}", None):
            moment, _, text = line.decode(errors="replace").partition(" ")
            yield moment, text

    @property
    def _place(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.namespace, PLURAL

    def _ask(self, what: str, call: Callable[..., Any]) -> Any:
        for tried in range(1, TRIES + 1):
            last = tried == TRIES
            try:
                return call(_request_timeout=(CONNECT_S, READ_S))
            except self._failed as error:
                if error.status not in PASSING or last:
                    raise self._explained(what, error, tried) from None
            except urllib3.exceptions.HTTPError as error:
                if last:
                    raise Disconnected(
                        f"{what}: no answer from the API server {self.host} ({TRIES} tries; {_brief(error)}): "
                        "look at `kubectl get --raw /readyz`, or give --context"
                    ) from None
            time.sleep(PAUSE_S * 2 ** (tried - 1))
        raise AssertionError("unreachable")

    def _stream(self, call: Callable[..., Any], what: str, timeout: float | None) -> Iterator[bytes]:
        try:
            answer = call(_preload_content=False, _request_timeout=(CONNECT_S, timeout or WATCH_S))
            with contextlib.closing(answer):
                if not 200 <= answer.status < 300:
                    raise self._failed(http_resp=answer)
                rest = b""
                for piece in answer.stream(2**16):
                    *lines, rest = (rest + piece).split(b"\n")
                    yield from filter(None, lines)
                if rest:
                    yield rest
        except self._failed as error:
            if error.status in (410, *PASSING):  # 410: the version to go on from is too old
                raise Disconnected(f"{what}: the API server {self.host} said {error.status}") from None
            raise self._explained(what, error) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Disconnected(f"{what}: the connection to {self.host} ended: {_brief(error)}") from None

    def _explained(self, what: str, error: Any, tried: int = 1) -> LlavaError:
        """The one line for an answer of the API server that is no success."""
        answer = _status_of(error)
        missing_object = error.status == 404 and answer.get("details", {}).get("name")
        kind, text = ANSWERS.get("missing" if missing_object else error.status, ANSWERS[500])
        said = " ".join(str(answer.get("message") or error.reason or "").split())
        told = text.format(host=self.host, status=error.status, said=said, tried=tried)
        return kind(f"{what} in namespace {self.namespace}: {told}")


def _configure(context: str | None) -> tuple[Any, Any]:
    """The client library and how to reach the server: a pod's service account first, then a kubeconfig."""
    try:
        from kubernetes import client, config
        from kubernetes.config import incluster_config
    except ImportError:
        raise RefusedInput(
            "`llava submit` needs the kubernetes client: pip install 'llava-workflow[k8s]'"
        ) from None
    configuration = client.Configuration()
    try:
        if context is None and Path(incluster_config.SERVICE_TOKEN_FILENAME).is_file():
            config.load_incluster_config(client_configuration=configuration)
        else:
            config.load_kube_config(context=context, client_configuration=configuration)
    except config.ConfigException as error:
        raise RefusedInput(
            f"no cluster to submit to: {_brief(error)}; set KUBECONFIG, give --context, or run inside a pod"
        ) from None
    return client, configuration


def _status_of(error: Any) -> dict[str, Any]:
    try:
        body = json.loads(error.body or "{}")
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _brief(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
