"""Write `constraints.txt`: the version of everything that the image installs, as pip resolves it today.

`python k8s/image/lock.py`, in an environment that can resolve the package. Torch is locked to its version, not to a
build of it: the image takes the CUDA or the CPU build from the index that it is given, and with it the
libraries of that build, whose versions torch itself pins.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = f"{HERE.parents[1]}[captions,concepts,judge,k8s,lora,mlflow-server,teacher]"
HEAD = "# Made by `python k8s/image/lock.py`; see there.\n"


def main() -> None:
    """Resolve, installing nothing, and write one `name==version` a line."""
    command = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", PACKAGE]
    report = subprocess.run([sys.executable, "-m", "pip", *command], check=True, stdout=subprocess.PIPE)
    found = [item["metadata"] for item in json.loads(report.stdout)["install"]]
    lines = {
        f"{one['name'].lower().replace('_', '-')}=={one['version'].partition('+')[0]}\n"
        for one in found
        if one["name"] != "llava-workflow"
    }
    (HERE / "constraints.txt").write_text(HEAD + "".join(sorted(lines)))


if __name__ == "__main__":
    main()
