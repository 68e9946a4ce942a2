"""What the user reads: plain lines on standard error while a command works, the result on standard output."""

from __future__ import annotations

import sys

from components.contract.printable import printable
from components.contract.secrets import redacted


def say(text: str, prefix: str = "") -> None:
    """Print `text` on standard error, each line with `prefix` (a component's name) before it.

    Standard output is left to the final result, so that it can be piped. Control characters are written out, and
    secrets are starred, whatever `text` quotes.
    """
    lines = [printable(line) for line in redacted(text).removesuffix("\n").split("\n")]
    if sys.stderr.isatty():
        from rich.console import Console as Terminal
        from rich.text import Text

        terminal = Terminal(stderr=True, highlight=False)
        for line in lines:
            head = Text(f"{prefix}  ", style="bold cyan") if prefix else Text()
            terminal.print(head + Text(line), soft_wrap=True)
        return
    for line in lines:
        print(f"{prefix}: {line}" if prefix else line, file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Print a result on standard output, written out and starred as `say` does it."""
    print(printable(redacted(text)), flush=True)


class Console:
    """Where a workspace's lines go; a test or a service gives its own with the same one method."""

    def say(self, text: str, prefix: str = "") -> None:
        """Print one message; see `say`."""
        say(text, prefix)
