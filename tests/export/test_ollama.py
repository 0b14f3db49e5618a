"""Ollama is no package of a registry; its Modelfile is checked by rendering its template beside the chat template."""

import re
from pathlib import Path
from typing import Any

import jinja2
import pytest

from swift.config.export import ExportConfig
from swift.config.options import build as build_config
from swift.export.go_template import find_pieces
from swift.export.run import run_export
from tests.export.go_templates import render as render_go
from tests.tiny import CHATML, make_model

QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% set ns = namespace(before='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.before = m.content + '\n\n' %}"
    "{% else %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ ns.before }}{{ m.content }}<end_of_turn>\n"
    "{% set ns.before = '' %}{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
LLAMA2 = (
    "{% set ns = namespace(before='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.before = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
    "{% elif m.role == 'user' %}<s>[INST] {{ ns.before }}{{ m.content }} [/INST]{% set ns.before = '' %}"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
BRACES = (
    "{% for m in messages %}{{ '{{' }}{{ m.role }}}}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{' }}assistant}}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "qwen": QWEN, "gemma": GEMMA, "refuses system": REFUSES_SYSTEM, "llama2": LLAMA2, "braces": BRACES}
SECRET = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"  # changes the contents
COUNTS = "{% for m in messages %}[{{ loop.index }} {{ m.role }}] {{ m.content }}\n{% endfor %}"  # depends on the place
CONVERSATIONS = [
    [("user", "Is it cold?\nYes.")],
    [("system", "Be brief."), ("user", "\u5357\u4eac")],
    [("user", "a"), ("assistant", "b"), ("user", "c {d}")],
    [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


def renderer(template: str) -> Any:
    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    compiled = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).from_string(template)
    return lambda messages, begins: compiled.render(messages=messages, add_generation_prompt=begins, raise_exception=refuse)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_in_go_gives_what_the_chat_template_gives(name: str):
    render = renderer(TEMPLATES[name])
    pieces = find_pieces(render, (jinja2.TemplateError,))
    assert pieces is not None
    conversations = [[{"role": role, "content": content} for role, content in told] for told in CONVERSATIONS]
    if pieces.system is None:
        conversations = conversations[::2]
    for messages in conversations:
        given = messages
        if pieces.default_system and messages[0]["role"] != "system":  # the Modelfile names it, and Ollama puts it first
            given = [{"role": "system", "content": pieces.default_system}, *messages]
        assert render_go(pieces.go(), given) == render(messages, True)


def test_a_regular_template_is_short():
    pieces = find_pieces(renderer(CHATML), (jinja2.TemplateError,))
    assert pieces is not None
    assert pieces.go() == (
        '{{ range $place, $message := .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n'
    )


def test_the_system_message_that_a_template_writes_by_itself_is_found():
    pieces = find_pieces(renderer(QWEN), (jinja2.TemplateError,))
    assert pieces is not None and pieces.default_system == "You are a helpful assistant."


@pytest.mark.parametrize("template", [SECRET, COUNTS])
def test_templates_that_do_more_have_no_pieces(template: str):
    assert find_pieces(renderer(template), (jinja2.TemplateError,)) is None


def export(model: Path, target: Path) -> str:
    """The text of the Modelfile."""
    options = {"model": str(model), "to": "ollama", "gguf_type": "q8_0", "quant_eval_samples": 0, "output_dir": str(target)}
    run_export(build_config(ExportConfig, ("test", options)))
    return (target / "Modelfile").read_text()


def test_a_modelfile_says_all_that_ollama_asks_for(tmp_path: Path):
    model = make_model(tmp_path / "tiny", chat_template=QWEN)
    (model / "LICENSE").write_text("Do what you like.\n")
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 0], "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05}')
    text = export(model, tmp_path / "out")
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, flags=re.DOTALL | re.MULTILINE)
    assert template is not None and template[1].endswith("<|im_start|>assistant\n")
    lines = text.replace(template[0], "").splitlines()
    assert [line for line in lines if line] == [
        "FROM ./tiny-Q8_0.gguf",
        'SYSTEM """You are a helpful assistant."""',
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER num_ctx 2048",
        "PARAMETER temperature 0.7",
        "PARAMETER top_p 0.8",
        "PARAMETER repeat_penalty 1.05",
        'LICENSE """Do what you like."""',
    ]
    assert (tmp_path / "out" / "tiny-Q8_0.gguf").is_file()


def test_a_template_that_cannot_be_said_is_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = export(make_model(tmp_path / "tiny", chat_template=COUNTS), tmp_path / "out")
    assert "TEMPLATE" not in text
    assert "chat template does more" in "".join(capsys.readouterr())


def test_a_model_without_a_chat_template_gets_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = export(make_model(tmp_path / "tiny", chat_template=None), tmp_path / "out")
    assert "TEMPLATE" not in text
    assert "chat template" not in "".join(capsys.readouterr())
