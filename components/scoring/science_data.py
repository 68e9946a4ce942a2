"""ScienceQA as training data: `python -m components.scoring.science_data problems.json pid_splits.json FILE`.

Writes the ecosystem's JSON of conversations, which `shard.source=llava` reads: the problem as the user's turn, the
answer (in QCM-LEA after lecture and explanation) as the model's. Pictures are named `ID/image.png`, as ScienceQA
stores them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from components.contract import say
from components.scoring.base import read_object
from components.scoring.benchmarks.scienceqa import Style, conversations, read_problems
from llava.errors import LlavaError


def write(problems: Path, splits: Path | None, split: str, style: Style, out: Path) -> int:
    """Write `out`; gives the number of samples. Raises `RefusedInput` for a problem that cannot be right."""
    ids = [problem.id for problem in read_problems(problems, splits, split)]
    samples = conversations(read_object(problems), ids, style)
    out.write_text(json.dumps(samples, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return len(samples)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m components.scoring.science_data", description=__doc__)
    parser.add_argument("problems", type=Path)
    parser.add_argument("splits", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--style", choices=get_args(Style), default="QCM-LEA")
    options = parser.parse_args()
    try:
        count = write(options.problems, options.splits, options.split, options.style, options.out)
    except LlavaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    say(f"{options.out}: {count:,} samples, {options.style}")


if __name__ == "__main__":
    main()
