"""Secrets are refused where people write text, and starred wherever text is shown."""

from __future__ import annotations

import pytest

from components.contract import refuse_secrets, say
from components.contract.secrets import redacted
from llava.errors import RefusedInput
from workflows import config as configs
from workflows import failures

LONG = "Abcdefghij0123456789Klmnopqrst"
SECRETS = {
    "password in a URI": "postgresql://user:hunter2secret@db:5432/mlflow",
    "credentials of an endpoint": "http://key:hunter2secret@minio:9000",
    "user in a URI": "https://hunter2secret@host/path",
    "api_key": "https://host/v1?api_key=hunter2secret",
    "key": "https://host/v1?page=1&key=hunter2secret",
    "sig": "https://account.blob.core.windows.net/c/b?sv=1&sig=hunter2secret",
    "X-Goog-Signature": "https://storage.googleapis.com/b/o?X-Goog-Signature=hunter2secret",
    "X-Amz-Signature": "https://b.s3.amazonaws.com/o?X-Amz-Signature=hunter2secret",
    "passwd": "https://host/?passwd=hunter2secret",
    "odbc_connect": "mssql+pyodbc://?odbc_connect=hunter2secret",
    "access_token": "https://host/?access_token=hunter2secret",
    "session_token": "https://host/?x=1&session_token=hunter2secret",
    "AWS access key": "AKIAABCDEFGHIJKLMNOP",
    "AWS secret key": "aws_secret_access_key = hunter2secret",
    "sk-": f"sk-proj-{LONG}",
    "hf_": f"hf_{LONG}",
    "ghp_": f"ghp_{LONG}",
    "github_pat_": f"github_pat_{LONG}",
    "glpat-": f"glpat-{LONG}",
    "xoxb-": "xoxb-0123456789-hunter2secret",
    "AIza": "AIza" + "A" * 35,
    "JSON web token": f"eyJ{LONG}.eyJ{LONG}.{LONG}",
    "private key": "-----BEGIN RSA PRIVATE KEY-----",
    "bearer": f"Authorization: Bearer {LONG}",
}
HARMLESS = (
    "0123456789abcdef" * 4,
    "https://host/data?page=1&split=train",
    "s3://bucket/a/b-c_d/part-00000.parquet",
    "lmsys/vicuna-7b-v1.5",
    "instruct.max_tokens=512",
    "the task-force asked a key question: why?",
    "/home/user/Data/coco/annotations/instances_train2017.json",
    "models:/llava-tiny@champion",
)


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_refused_in_a_setting_and_its_text_is_not_repeated(kind: str) -> None:
    with pytest.raises(RefusedInput) as refusal:
        configs.load("tiny", [f"shard.path={SECRETS[kind]}"])
    assert "shard.path" in str(refusal.value)
    assert not [part for part in ("hunter2secret", LONG, "AAAA") if part in str(refusal.value)]


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_starred_in_what_is_printed(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(f"before {SECRETS[kind]} after", "shard")
    failures.tell(RefusedInput(f"before {SECRETS[kind]} after"))
    shown = capsys.readouterr().err
    assert shown.count("***") >= 2 and shown.count("before ") == 2
    assert not [part for part in ("hunter2secret", LONG, "AAAA", "IJKLMNOP", "RSA") if part in shown]


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_text_passes(text: str) -> None:
    assert refuse_secrets(text) == text and redacted(text) == text


def test_what_the_environment_holds_is_known_by_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("OPENAI_API_KEY", "plain-words-as-key")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/run/secrets/token")
    text = "signed with wJalrXUtnFEMI/K7MDENG and plain-words-as-key from /run/secrets/token"
    assert redacted(text) == "signed with *** and *** from /run/secrets/token"
    with pytest.raises(RefusedInput, match="a secret that the environment holds"):
        refuse_secrets(text)
