"""Secrets come from the environment or mounted files; wherever a user writes text, they are refused."""

from __future__ import annotations

import re

from llava.errors import RefusedInput

# Command lines, configs and URIs end up in job specs, dashboards and logs, where anybody reads them.
_SECRETS = (
    (re.compile(r"\b[a-z][a-z0-9+.-]{0,63}://[^/\s@:]*:[^/\s@]+@", re.I), "a URI with a password in it"),
    (re.compile(r"\b(?:https?|s3)://[^/\s@]+@", re.I), "a URI with credentials in it"),
    (re.compile(r"[?&](?:x-amz-(?:signature|security-token)|access_?key|secret|token|password)=", re.I),
     "a signed or tokened URI"),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), "an AWS access key"),
)  # fmt: skip


def refuse_secrets(text: str, what: str = "this value") -> str:
    """Return `text` unless it carries a secret.

    Raises RefusedInput, which names `what` and the kind of the secret, and never the text itself.
    """
    for pattern, kind in _SECRETS:
        if pattern.search(text):
            raise RefusedInput(
                f"{what} holds {kind}, which logs and dashboards would show: take it out; give credentials "
                "through the environment (AWS_ACCESS_KEY_ID, MLFLOW_TRACKING_USERNAME, ...) or mounted files"
            )
    return text


def without_secret(text: str, secret: str) -> str:
    """`text` as it may be shown: each `secret` in it as three stars."""
    return text.replace(secret, "***") if secret else text
