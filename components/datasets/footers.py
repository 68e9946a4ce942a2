"""Whether Parquet footers can be read at all: found out in a process that may die of one.

A schema nested some thousand levels deep overflows the stack of Arrow's parser, which no exception tells. So the
footers are first read by a process of their own, with a small stack. `python -m components.datasets.footers` reads
from its input a line with the folder, whether links are followed, and the files; for each it writes the number once the
file is read.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import threading
from collections.abc import Sequence

import pyarrow.parquet as pq

from components.contract.store import Store, open_data_store
from llava.errors import RefusedInput

_STACK = 512 * 2**10
_SECONDS = 120.0
"""For all footers together, and a second for each."""
_known: set[tuple[str, str, str]] = set()


def check_footers(store: Store, follow_links: bool | None, keys: Sequence[str]) -> None:
    """Raise RefusedInput for a file whose footer ends the process that reads it, or keeps it busy for minutes.

    Other damage is for the reader to find. A footer that passed is not looked at again.
    """
    versions = {key: "" if (stat := store.stat(key)) is None else stat.version for key in keys}
    new = [key for key in keys if (store.uri, key, versions[key]) not in _known]
    if not new:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps([store.uri, follow_links, new]).encode(),
            capture_output=True,
            timeout=_SECONDS + len(new),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _refusal(store, new, error.stdout or b"", "reading its footer does not end") from None
    if done.returncode:
        why = (
            f"reading its footer ends the process (status {done.returncode}): its schema is nested too deeply"
        )
        raise _refusal(store, new, done.stdout, why)
    _known.update((store.uri, key, versions[key]) for key in new)


def _refusal(store: Store, keys: Sequence[str], told: bytes, why: str) -> RefusedInput:
    read = min(told.count(b"\n"), len(keys) - 1)
    return RefusedInput(f"{store.uri}/{keys[read]} is no Parquet file that can be read: {why}")


def main() -> None:
    """The process: one line for each footer, in their order."""
    uri, follow_links, keys = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    store = open_data_store(uri, follow_links)
    threading.stack_size(_STACK)
    for number, key in enumerate(keys):
        reader = threading.Thread(target=_read, args=(store, key))
        reader.start()
        reader.join()
        print(number, flush=True)


def _read(store: Store, key: str) -> None:
    with contextlib.suppress(Exception), store.open(key) as source, pq.ParquetFile(source) as file:
        _ = file.schema_arrow


if __name__ == "__main__":
    main()
