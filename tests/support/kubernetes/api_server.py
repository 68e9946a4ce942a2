"""A small HTTP server that answers as the Kubernetes API server does, for RayJobs, pods and their logs.

Real sockets, for the real client. It keeps objects, holds every body that is posted against the strict schema, writes
down the requests in their order, streams watches, and fails as it is told: with a status, slowly, or in the
middle of a stream.
"""

import json
import queue
import re
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.kubernetes.schemas import errors_of

TOKEN = "a-token-of-the-test"
RAYJOBS = re.compile(r"/apis/ray\.io/v1/namespaces/(?P<namespace>[^/]+)/rayjobs(?:/(?P<name>[^/]+))?")
PODS = re.compile(r"/api/v1/namespaces/(?P<namespace>[^/]+)/pods(?:/(?P<name>[^/]+)/log)?")
REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "AlreadyExists",
    422: "Invalid",
    500: "InternalError",
    503: "ServiceUnavailable",
}


@dataclass
class Fault:
    """What one request meets: a status, `seconds` of silence before it, or a body that is no JSON."""

    status: int
    message: str = "as told"
    seconds: float = 0.0
    plain: bool = False


@dataclass
class ApiServer:
    """The server's state; `faults` are used up one by one, by method."""

    url: str = ""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    pods: dict[str, list[str]] = field(default_factory=dict)
    """Pod name -> its log's lines, with their times."""
    pod_labels: dict[str, dict[str, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    bad_bodies: list[str] = field(default_factory=list)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    lines_before_a_cut: int | None = None
    """After so many lines a log's connection is cut, once."""
    watchers: list["queue.Queue[dict[str, Any] | None]"] = field(default_factory=list)
    watched: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released each time that a watch begins."""
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _version: int = 100

    def fail(self, method: str, *faults: Fault) -> None:
        """The next requests of `method` meet these faults."""
        self.faults.setdefault(method, []).extend(faults)

    def put(self, job: dict[str, Any], event: str = "MODIFIED") -> dict[str, Any]:
        """Keep `job` under its name, as something that the server or a controller did; watchers are told."""
        with self._lock:
            self._version += 1
            metadata = {
                "uid": f"uid-{job['metadata']['name']}",
                "creationTimestamp": "2026-11-23T02:30:00Z",
                **job["metadata"],
                "resourceVersion": str(self._version),
            }
            kept = {**job, "metadata": metadata}
            self.jobs[metadata["name"]] = kept
            for watcher in self.watchers:
                watcher.put({"type": event, "object": kept})
            return kept

    def set_status(self, name: str, **status: Any) -> None:
        """What KubeRay would write into the job's status."""
        self.put({**self.jobs[name], "status": {**self.jobs[name].get("status", {}), **status}})

    def delete(self, name: str) -> None:
        """As somebody with kubectl."""
        with self._lock:
            job = self.jobs.pop(name)
            for watcher in self.watchers:
                watcher.put({"type": "DELETED", "object": job})

    def cut_watches(self) -> None:
        """End every watch in the middle of the stream."""
        with self._lock:
            for watcher in self.watchers:
                watcher.put(None)
            self.watchers.clear()


@contextmanager
def serve(certificate: tuple[Path, Path] | None = None) -> Iterator[ApiServer]:
    """The server on a free port of 127.0.0.1; with `certificate` (file, key) it speaks HTTPS."""
    state = ApiServer()
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    state.url = f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.cut_watches()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""

    def do_GET(self) -> None:
        """Objects, lists, watches, logs."""
        if self._refused():
            return
        path, query = self._address()
        if found := PODS.fullmatch(path):
            self._log(found["name"]) if found["name"] else self._pods(query)
        elif found := RAYJOBS.fullmatch(path):
            if found["name"]:
                self._one(found["name"])
            elif query.get("watch") == "true":
                self._watch(query)
            else:
                self._list(query)
        else:
            self._send(404, b"404 page not found\n", "text/plain")

    def do_POST(self) -> None:
        """Create a RayJob whose body fits the schema and whose name is free."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        state, name = self.state, body["metadata"]["name"]
        state.bodies.append(body)
        if errors := errors_of(body):
            state.bad_bodies += errors
            self._status(422, f'RayJob.ray.io "{name}" is invalid: {errors[0]}', name)
            return
        with state._lock:
            if name in state.jobs:
                self._status(409, f'rayjobs.ray.io "{name}" already exists', name)
            else:
                self._json(201, state.put(body, "ADDED"))

    def _address(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {key: values[-1] for key, values in parse_qs(parts.query).items()}

    def _refused(self) -> bool:
        path, query = self._address()
        kind = "WATCH" if query.get("watch") == "true" else "LOG" if path.endswith("/log") else self.command
        kind = "LIST" if kind == "GET" and not (RAYJOBS.fullmatch(path) or {"name": "x"})["name"] else kind
        self.state.requests.append(f"{kind} {path.rpartition('/namespaces/')[2]}")
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if (scheme.lower(), token) != ("bearer", TOKEN):
            self._status(401, "Unauthorized")
            return True
        faults = self.state.faults.get(kind)
        if not faults:
            return False
        fault = faults.pop(0)
        time.sleep(fault.seconds)
        if fault.plain:
            self._send(fault.status, b"404 page not found\n", "text/plain")
        elif fault.status:
            name = path.rpartition("/")[2] if kind == "GET" else ""
            self._status(fault.status, fault.message, name)
        return bool(fault.status)

    def _one(self, name: str) -> None:
        if name in self.state.jobs:
            self._json(200, self.state.jobs[name])
        else:
            self._status(404, f'rayjobs.ray.io "{name}" not found', name)

    def _list(self, query: dict[str, str]) -> None:
        key, _, value = query.get("labelSelector", "").partition("=")
        jobs = list(self.state.jobs.values())
        found = [job for job in jobs if not key or job["metadata"].get("labels", {}).get(key) == value]
        body = {
            "apiVersion": "ray.io/v1",
            "kind": "RayJobList",
            "metadata": {"resourceVersion": "1"},
            "items": found,
        }
        self._json(200, body)

    def _watch(self, query: dict[str, str]) -> None:
        name = query["fieldSelector"].removeprefix("metadata.name=")
        events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        with self.state._lock:
            # As the real one: what happened since the version that the client knows comes first.
            job = self.state.jobs.get(name)
            if job and int(job["metadata"]["resourceVersion"]) > int(query["resourceVersion"]):
                events.put({"type": "MODIFIED", "object": job})
            self.state.watchers.append(events)
        self._begin_stream("application/json")
        self.state.watched.release()
        while (event := events.get()) is not None:
            if event["object"]["metadata"]["name"] == name and not self._chunk(
                json.dumps(event).encode() + b"\n"
            ):
                return
        self._cut()

    def _pods(self, query: dict[str, str]) -> None:
        key, _, value = query.get("labelSelector", "").partition("=")
        items = [
            {"metadata": {"name": name, "namespace": "llava", "creationTimestamp": "2026-11-23T02:31:00Z"}}
            for name in self.state.pods
            if self.state.pod_labels.get(name, {}).get(key) == value
        ]
        self._json(200, {"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": items})

    def _log(self, name: str) -> None:
        self._begin_stream("text/plain")
        state = self.state
        for number, line in enumerate(list(state.pods[name])):
            if number == state.lines_before_a_cut:
                state.lines_before_a_cut = None
                self._cut()
                return
            if not self._chunk(line.encode() + b"\n"):
                return
        self._chunk(b"")

    def _begin_stream(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> bool:
        try:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
        except OSError:
            return False
        return True

    def _cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(2)

    def _json(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, json.dumps(body).encode(), "application/json")

    def _status(self, status: int, message: str, name: str = "") -> None:
        details = {"name": name, "group": "ray.io", "kind": "rayjobs"} if name else {}
        body = {
            "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
            "message": message, "reason": REASONS.get(status, ""), "details": details, "code": status,
        }  # fmt: skip
        self._json(status, body)

    def _send(self, status: int, body: bytes, kind: str) -> None:
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
