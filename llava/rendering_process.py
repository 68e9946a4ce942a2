"""The process in which chat templates are rendered: a line of JSON in, a line of JSON out, within limits.

It is started by `llava.rendering` and ends with the pipe. It imports nothing of this package.
"""

import json
import resource
import sys
from typing import Any

from transformers.utils.chat_template_utils import _get_template_literal_text, render_jinja_template

MEMORY = 1 << 30


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """`text` or, for a template that fails, `error`. Without messages: the literal text of the template."""
    try:
        text = _written(asked)
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:
        return {"error": f"rendering failed with {' '.join(str(error).split())[:300]!r}"}
    if len(text) > asked["longest"]:
        return {"error": f"it writes more than {asked['longest']:,} characters"}
    return {"text": text}


def _written(asked: dict[str, Any]) -> str:
    if asked["messages"] is None:
        return str(_get_template_literal_text(asked["template"]))
    written: Any = render_jinja_template(
        conversations=[asked["messages"]],
        chat_template=asked["template"],
        add_generation_prompt=asked["opened"],
        **asked["tokens"],
    )
    texts, _ = written
    return str(texts[0])


def _allow(seconds: int) -> None:
    """Processor time from now on; whoever needs more is ended by the kernel."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def main() -> None:
    """Answer until the pipe is closed."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        _allow(asked["seconds"])
        sys.stdout.buffer.write(json.dumps(answer(asked)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
