"""Where a benchmark's page and figures go."""

import json
from pathlib import Path
from typing import Any


def write(folder: Path | None, name: str, page: str, report: dict[str, Any]) -> None:
    """Print the page; with a folder, write it there as `name`.md, and all figures as `name`.json."""
    print(page)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(page)
        (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
