"""Chat templates from anybody: one that never ends, or writes without end, is stopped; all others render as before."""

from __future__ import annotations

import os
import resource
import time
from inspect import signature
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from llava import generate, rendering
from llava.errors import RefusedInput
from llava.rendering import RenderingError, render
from llava.templates import OWN, template
from tests.support.tiny_llava import byte_tokenizer

ASKED = [{"role": "user", "content": "What?"}]
_LOOP = "{% for i in range(99999) %}"
ENDLESS = {
    "loops": (_LOOP * 4 + "{% endfor %}" * 4, "not done after"),
    "loops in a branch": (
        "{% if messages|length > 0 %}"
        + _LOOP * 4
        + "{% endfor %}" * 4
        + "{% endif %}{{ messages[0].content }}",
        "not done after",
    ),
    "a power": ("{{ 9 ** 9999999999 }}", "not done after|memory"),
    "a power in a variable": (
        "{% set n = messages|length + 8 %}{{ n ** (n ** 10) }}",
        "not done after|memory",
    ),
    "a repeated text": ("{{ 'x' * 9999999999 }}", "memory"),
    "a doubled text": (
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "memory",
    ),
    "a padded text": ("{{ '%9999999999d' % 1 }}", "memory|failed"),
    "a long text": ("{{ 'x' * 5000000 }}", "writes more than"),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "brackets": ("{{ " + "(" * 20_000, "failed|not done|process"),
}
EACH = ("loops", "a repeated text", "a long text", "brackets")
"""One of each way in which it is stopped: by time, by memory, by length, by what it is; the others are drills."""


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 2)


@pytest.mark.parametrize(
    "name",
    [name if name in EACH else pytest.param(name, marks=pytest.mark.drill) for name in ENDLESS],
)
def test_a_template_without_end_is_refused_in_one_line(name: str) -> None:
    source, reason = ENDLESS[name]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RefusedInput, match="chat template cannot be split into turns") as refused:
        template(OWN, tokenizer)
    with pytest.raises(
        RefusedInput, match=rf"the folder's chat template cannot be used: .*(?:{reason})"
    ) as asked:
        generate._encoded(tokenizer, source, ASKED[0])
    for told in (str(refused.value), str(asked.value)):
        assert "\n" not in told and len(told) < 1000
    assert time.monotonic() - began < 120
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 200_000


def test_the_next_template_is_rendered_after_one_that_was_ended() -> None:
    with pytest.raises(RenderingError):
        render(_LOOP * 4 + "{% endfor %}" * 4, ASKED, {})
    assert render("{{ messages[0].content }}{{ eos_token }}", ASKED, {"eos_token": "<end>"}) == "What?<end>"


SOURCES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "{{ messages[0].content | trim }}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
    "{{ bos_token or '' }}{{ messages[0].content.split('<')[0] }}",
)


@pytest.mark.skipif(
    "sanitize_control_tokens" not in signature(PreTrainedTokenizerFast.apply_chat_template).parameters,
    reason="transformers before 5.20 has no such option",
)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("text", ["What?", " <|im_end|> and <pad>", "caf\u00e9 \U0001f600"])
def test_ids_are_those_of_the_library(source: str, text: str) -> None:
    tokenizer = byte_tokenizer()
    turn = {"role": "user", "content": text}
    stock = tokenizer.apply_chat_template(
        [turn],
        chat_template=source,
        add_generation_prompt=True,
        sanitize_control_tokens=True,
        return_dict=False,
    )
    assert generate._encoded(tokenizer, source, turn) == stock


def test_the_process_has_no_secret_and_ends_with_this_one() -> None:
    render("{{ 1 }}", ASKED, {})
    child = rendering._PROCESS._child
    assert child is not None
    names = {
        entry.split(b"=")[0].decode()
        for entry in Path(f"/proc/{child.pid}/environ").read_bytes().split(b"\0")
    }
    assert not names & {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"}
    assert os.getpgid(child.pid) != os.getpgid(0)
    rendering._PROCESS.stop()
    assert child.returncode is not None
