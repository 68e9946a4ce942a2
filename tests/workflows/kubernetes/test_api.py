"""What the Kubernetes API server refuses, loses or never answers is one line; in a pod its account is used."""

import datetime
import ipaddress
from pathlib import Path

import pytest

from tests.support.kubernetes.api_server import TOKEN, ApiServer, Fault, serve
from tests.support.kubernetes.rendering import of_kind, render
from tests.support.kubernetes.submitting import NAME, ORDER, TRAIN, Command, last
from workflows.kubernetes import api

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
