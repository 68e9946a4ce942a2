"""Write `requirements.txt`: the version and the hash of everything that the image installs, as pip resolves it today.

`python k8s/image/lock.py` asks PyPI alone, whatever this machine's pip is set to; it gives torch's CUDA build. Further
arguments go to pip, such as `--extra-index-url https://download.pytorch.org/whl/cpu` for the CPU build. The files are
those for the Python and the platform that it runs on: run it on Linux with Python 3.11, as the image has.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = f"{HERE.parents[1]}[captions,concepts,judge,k8s,lora,mlflow-server,qlora,teacher]"
BUILD = ("ninja", "setuptools", "wheel")
"""What DeepSpeed and our own package are built with."""
HEAD = "# Made by `python k8s/image/lock.py`; see there.\n"


def main() -> None:
    """Resolve, installing nothing, and write one `name==version --hash=sha256:...` a line."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        pip = [sys.executable, "-m", "pip", "--isolated", "install"]
        what = ["--dry-run", "--ignore-installed", "--quiet", "--report", report.name, PACKAGE, *BUILD]
        environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull}
        subprocess.run([*pip, *what, *sys.argv[1:]], check=True, env=environment)
        found = json.loads(Path(report.name).read_bytes())["install"]
    lines = {_line(one) for one in found if one["metadata"]["name"] != "llava-workflow"}
    (HERE / "requirements.txt").write_text(HEAD + "".join(sorted(lines)))


def _line(found: dict[str, dict[str, str]]) -> str:
    name, version = (found["metadata"][key] for key in ("name", "version"))
    sha256: str = found["download_info"]["archive_info"]["hashes"]["sha256"]  # type: ignore[index]
    return f"{name.lower().replace('_', '-').replace('.', '-')}=={version} --hash=sha256:{sha256}\n"


if __name__ == "__main__":
    main()
