"""What a command costs before it does anything: a table of stages and their settings need no library of weight."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.repository import REPOSITORY

HEAVY = ("torch", "transformers", "ray", "mlflow", "deepspeed", "matplotlib", "scipy", "pandas", "boto3")
EVERY_STAGE = "from workflows import stages; [stage.component for stage in stages.STAGES]"


@pytest.mark.parametrize(
    "code",
    [
        "import workflows.cli",
        "import workflows.train",
        "import workflows.config; workflows.config.load('tiny')",
        "import workflows.estimate",
        "import workflows.prune",
        EVERY_STAGE,
    ],
)
def test_it_is_ready_without(code: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", f"import json, sys; {code}; print(json.dumps(list(sys.modules)))"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert not set(HEAVY) & set(json.loads(found))
