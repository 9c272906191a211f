"""Chat templates that never end, or write without bound, fail after a counted amount of work."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from students_support import dialogue
from tiny_templates import chat_template, glm_template, media_first_template, thinking_template
from transformers.utils import chat_template_utils

from motionenhancer import chat_template as counting
from motionenhancer.chat_template import EndlessTemplate, apply_chat_template
from motionenhancer.students import load_student
from motionenhancer.students.load import load_processor

LISTS = "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}"
SPACES = "{% for i in range(60) %}{% set n.a = namespace(b=n.a, c=n.a) %}{% endfor %}"
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop's test": "{% for i in range(999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "a filter in a loop": "{% set r = range(99999) %}{% for i in r %}{% set x = r|sum %}{% endfor %}",
    "macro": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "long output": "{% for i in range(99999) %}" + "x" * 200 + "{% endfor %}",
    "string product": "{{ 'a' * 10**10 }}",
    "list product": "{{ [1] * 10**10 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": "{% set n = namespace(a=3) %}{% for i in range(60) %}{% set n.a = n.a * n.a %}{% endfor %}",
    "joined": "{% set n = namespace(a='ab') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "added": "{% set n = namespace(a='ab') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "shown lists": LISTS + "{{ n.a }}",
    "compared lists": LISTS + "{% if n.a == [n.a] %}{% endif %}",
    "lists as JSON": LISTS + "{{ n.a|tojson }}",
    "namespaces": "{% set n = namespace(a=1) %}" + SPACES + "{{ n.a }}",
    "slices": "{% set r = 'a' * 99999 %}{% for i in range(99999) %}{% set x = r[1:] %}{% endfor %}",
    "comparisons": "{% set r = 'a' * 99999 %}{% for i in range(999) %}{% if r < r %}{% endif %}{% endfor %}",
    "method": "{{ 'a'.ljust(10000000000) }}",
    "filter": "{{ 'a'|center(10000000000) }}",
    "filter block": "{% filter center(10000000000) %}a{% endfilter %}",
    "mapped filter": "{{ ['a']|map('center', 10000000000)|list }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent with a star": "{{ '%*d' % (10000000000, 1) }}",
    "percent with a name": "{{ ('%(a)s' * 99999) % {'a': 'b' * 9999} }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format with a width": "{{ '{:{}}'.format(1, 10000000000) }}",
    "format filter": "{{ '%10000000000d'|format(1) }}",
    "indent": "{{ messages|tojson(indent=10000000000) }}",
}


@pytest.fixture(scope="module")
def processor(student_dir: Path) -> Any:
    return load_processor(student_dir)


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_without_an_end_fails(
    kind: str, processor: Any, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_WORK", 10**5)
    monkeypatch.setattr(counting, "_SHARE", 0)
    with pytest.raises(
        EndlessTemplate, match=f"chat template of {student_dir} .*more than 100000 units of work"
    ):
        apply_chat_template(processor, dialogue("a", "b").messages, template=ENDLESS[kind])


@pytest.mark.parametrize(
    "template", ["{{ lipsum(10**9) }}", "{{ 'a'|urlize }}", "{{ 'a'.encode('punycode') }}"]
)
def test_functions_that_take_more_steps_than_their_input_is_long_are_not_there(
    template: str, processor: Any
) -> None:
    with pytest.raises(ValueError, match=r"chat template of .* fails"):
        apply_chat_template(processor, dialogue("a", "b").messages, template=template)


USUAL = "\n".join(
    (
        "{% macro shown(m, end='.') %}{{ m.role }}{{ end }}{{ caller() if caller }}{% endmacro -%}",
        "{% for m in messages if m.role in ['user', 'assistant'] recursive %}{{ loop.index0 % 2 }}",
        "{{ shown(m, end='!') }}{%- for part in m.content[:3] if part.type == 'text' %}",
        "{{ part.text|trim|upper|replace('A', 'B') }}{% endfor %}{%- if loop.last %}{% break %}{% endif %}",
        "{% endfor %}{% call shown(messages[0]) %}{{ [1, 'a']|join('-') }}{% endcall %}",
        "{{ '%5s' % 'a' }}{{ '{:>4}{a}'.format(1, a=2) }}{{ 'x' * 3 ~ 2 ~ none }}{{ 2 ** 5 }}",
        "{{ messages|map(attribute='role')|list }}{{ messages|rejectattr('role', 'equalto', 'user')|list }}",
        "{% generation %}{{ messages|tojson(indent=1) }}{% endgeneration %}",
        "{% set text %}a{{ 1 }}{% endset %}{{ text * 2 }}{{ missing is defined }}{{ missing }}",
        "{{ dict(a=1)|items|list }}{{ namespace(a=2).a }}{{ 7 // 2 - -1 }}",
    )
)


@pytest.mark.parametrize(
    "template",
    [
        USUAL,
        chat_template("<i>", "<v>"),
        glm_template("<i>", "<v>"),
        media_first_template(),
        thinking_template("<i>", "<v>"),
    ],
)
def test_an_ordinary_template_writes_what_it_writes_without_the_count(
    template: str, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = dialogue("What is this?", " A ball. ", "Where?", "There.").messages
    counted = apply_chat_template(processor, messages, template=template, prompt=True)
    monkeypatch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", ImmutableSandboxedEnvironment)
    plain = chat_template_utils._cached_compile_jinja_template(template)
    names = processor.tokenizer.special_tokens_map
    assert counted == plain.render(messages=messages, add_generation_prompt=True, **names)
    assert counted


def test_a_long_conversation_has_work_enough(processor: Any) -> None:
    messages = dialogue(*["What moves in this clip? " * 40] * 200).messages
    assert "What moves" in apply_chat_template(processor, messages)


def test_the_template_of_a_folder_is_tried_when_it_is_loaded(student_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student_dir, tmp_path / "student"))
    (folder / "chat_template.jinja").write_text(ENDLESS["loops"])
    with pytest.raises(ValueError, match=rf"path '{folder}': the chat template of {folder} does not end"):
        load_student(folder)
