"""Secrets come from the environment or mounted files: text with one is refused, and what is shown is redacted.

Command lines, configs and URIs end up in job specs, dashboards and logs, where anybody reads them. The forms of tokens
are those that their issuers publish for secret scanning.
"""

from __future__ import annotations

import os
import re

from llava.errors import RefusedInput

_PARAMETERS = (
    r"x-amz-(?:signature|security-token|credential)|x-goog-(?:signature|credential)|sig|signature|key|api[_-]?key|"
    r"access[_-]?key|access[_-]?key[_-]?id|secret|secret[_-]?key|token|[a-z_]{1,32}[_-]token|password|passwd|pwd|"
    r"odbc_connect"
)
_SECRETS = (
    (re.compile(r"\b[a-z][a-z0-9+.-]{0,63}://[^/\s@:]*:[^/\s@]+@", re.I), "a URI with a password in it"),
    (re.compile(r"\b(?:https?|s3)://[^/\s@]+@", re.I), "a URI with credentials in it"),
    (re.compile(rf"[?&;](?:{_PARAMETERS})=[^&;\s\"']+", re.I), "a signed or tokened URI"),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), "an AWS access key"),
    (re.compile(r"\baws_secret_access_key[\"']?\s{0,8}[=:]\s{0,8}[^\s\"']+", re.I), "an AWS secret key"),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{16,512}"), "an API key (sk-...)"),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,512}"), "a Hugging Face token"),
    (re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,512}|github_pat_[A-Za-z0-9_]{20,512})"), "a GitHub token"),
    (re.compile(r"\bglpat-[A-Za-z0-9_-]{20,512}"), "a GitLab token"),
    (re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,512}"), "a Slack token"),
    (re.compile(r"\bAIza[A-Za-z0-9_-]{35}"), "a Google API key"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,2048}\.eyJ[A-Za-z0-9_-]{8,2048}\.[A-Za-z0-9_-]{0,2048}"), "a JSON web token"),
    (re.compile(r"-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----"), "a private key"),
    (re.compile(r"\bBearer\s{1,8}[A-Za-z0-9._~+/-]{16,512}", re.I), "a bearer token"),
)  # fmt: skip
_NAMES = re.compile(r"(?:^|_)(?:token|secret|password|passwd|key|credentials?)$", re.I)
_SHORTEST = 8
"""Characters of a value in the environment that is looked for; a shorter one would be found in ordinary words."""


def refuse_secrets(text: str, what: str = "this value") -> str:
    """Return `text` unless it carries a secret.

    Raises RefusedInput, which names `what` and the kind of the secret, and never the text itself.
    """
    kinds = [kind for pattern, kind in _SECRETS if pattern.search(text)]
    if any(value in text for value in _of_environment()):
        kinds.append("a secret that the environment holds")
    if kinds:
        raise RefusedInput(
            f"{what} holds {kinds[0]}, which logs and dashboards would show: take it out; give credentials "
            "through the environment (AWS_ACCESS_KEY_ID, MLFLOW_TRACKING_USERNAME, ...) or mounted files"
        )
    return text


def redacted(text: str) -> str:
    """`text` as it may be printed, stored or tagged: every secret in it as three stars."""
    for value in _of_environment():
        text = text.replace(value, "***")
    for pattern, _ in _SECRETS:
        text = pattern.sub(_starred, text)
    return text


def without_secret(text: str, secret: str) -> str:
    """`text` as it may be shown: each `secret` in it as three stars."""
    return text.replace(secret, "***") if secret else text


def _starred(found: re.Match[str]) -> str:
    """What names the secret stays: a scheme, a parameter."""
    text = found[0]
    if "://" in text:
        return f"{text.partition('://')[0]}://***@"
    name, equals, _ = text.partition("=")
    return f"{name}=***" if equals else "***"


def _of_environment() -> list[str]:
    """The values of variables that are called as secrets are, the longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if _NAMES.search(name) and len(value) >= _SHORTEST and not value.startswith(("/", "./"))
    }
    return sorted(found, key=len, reverse=True)
