"""The process in which chat templates are rendered: a line of JSON in, a line of JSON out, within limits.

It is started by `llava.rendering` and ends with the pipe. It imports nothing of this package.
"""

import json
import resource
import sys
from typing import Any

from jinja2 import nodes
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

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
        return _literals(asked["template"])
    written: Any = render_jinja_template(
        conversations=[asked["messages"]],
        chat_template=asked["template"],
        add_generation_prompt=asked["opened"],
        **asked["tokens"],
    )
    texts, _ = written
    return str(texts[0])


def _literals(template: str) -> str:
    """Text between the tags and in quotes, joined so that nothing is found across two of them."""
    tree = _compile_jinja_template(template).environment.parse(template)
    found = {str(node.data) for node in tree.find_all(nodes.TemplateData)}
    found |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return "\0".join(sorted(found))


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
