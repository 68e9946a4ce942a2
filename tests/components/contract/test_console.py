"""The user's lines: prefixed, on standard error, the same words on a terminal; and who made an artifact."""

from __future__ import annotations

import os
import platform
import pty
import subprocess
import sys

import pytest

from components.contract import say
from components.contract.provenance import code_revision, versions


def test_lines_go_to_standard_error_with_their_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    say("3 shards\n[100%] done", "shard")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "shard: 3 shards\nshard: [100%] done\n"


def test_terminal_shows_the_same_words() -> None:
    leader, follower = pty.openpty()
    program = "from components.contract import say; say('[red] 50% of ' + 'x' * 200, 'shard')"
    subprocess.run([sys.executable, "-c", program], stderr=follower, check=True, timeout=60)
    os.close(follower)
    shown = os.read(leader, 4096).decode()
    os.close(leader)
    assert "shard" in shown and "[red] 50% of " + "x" * 200 in shown, "no markup read, no line broken"


def test_revision_and_versions_name_what_ran() -> None:
    assert len(code_revision().split()[0]) >= 7
    assert versions()["python"] == platform.python_version()
    assert all(version[0].isdigit() for version in versions().values())
