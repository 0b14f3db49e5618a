"""Prompts as plain text and as turns, and the sandbox that their texts run in."""

import pytest

from swift.errors import DataError
from swift.evaluate.prompt import Chat, Prompt, Shot, names_in, render, scope, value
from tests.tiny import CHATML, make_tokenizer

PROMPT = Prompt("Q2?", description="About law.\n\n", shots=(Shot("Q1?", "A"),), delimiter=" ", separator="\n\n")


def test_plain_text_joins_description_solved_examples_and_question() -> None:
    assert PROMPT.plain() == "About law.\n\nQ1? A\n\nQ2?"


def test_with_a_chat_template_solved_examples_are_turns() -> None:
    text, notes = Chat(make_tokenizer(), system="Be short.").text(PROMPT)
    assert text == (
        "<|im_start|>system\nBe short.\n\nAbout law.\n\n<|im_end|>\n<|im_start|>user\nQ1?<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nQ2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert notes == {}


def test_a_template_that_refuses_a_system_message_has_it_in_the_first_question() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    chat = Chat(make_tokenizer(chat_template=refusing))
    for _ in range(2):
        text, notes = chat.text(PROMPT)
        assert text.startswith("<|im_start|>user\nAbout law.\n\nQ1?<|im_end|>\n")
        assert notes == {"system_in_question": True}


def test_expressions_keep_their_kind_and_templates_are_texts() -> None:
    fields = {"choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answer": "2"}
    assert value("choices.label.index(answer)", fields) == 1
    assert render("{{ choices.text | length }}", fields) == "2"
    assert value("answer | letter", {"answer": " C "}) == 2
    assert value("row | columns('ABC')", {"row": {"A": "x", "B": "", "Z": "y"}}) == {"A": "x"}


@pytest.mark.parametrize("text", ["().__class__.__mro__", "fields.__class__", "''.join.__globals__", "fields.pop('a')"])
def test_texts_of_a_declaration_cannot_leave_the_sandbox(text: str) -> None:
    fields = {"a": 1}
    with pytest.raises(DataError, match="here:1"):
        value(text, {"fields": fields}, "here:1")
    assert fields == {"a": 1}


def test_an_error_in_a_text_names_the_row_and_the_text() -> None:
    with pytest.raises(DataError, match=r"mine.csv:7: 'answer | letter' cannot be computed: 'E5' is no letter of a choice"):
        value("answer | letter", {"answer": "E5"}, "mine.csv:7")
    with pytest.raises(DataError, match=r"mine.csv:7: '\{\{ b \}\}' cannot be computed: 'b' is undefined"):
        render("{{ b }}", {"a": 1}, "mine.csv:7")


def test_a_column_may_have_any_name_and_a_pattern_be_wrong() -> None:
    assert value("a", {"a": 1, "self": 2}) == 1
    with pytest.raises(DataError, match=r"here:1: .* cannot be computed: missing \)"):
        value("a | regex_replace('(', '')", {"a": "x"}, "here:1")


def test_a_column_called_category_is_seen_where_files_tell_none() -> None:
    assert value("category", scope({"category": "law"}, "", {})) == "law"
    assert value("category_name", scope({"category": "law"}, "tax", {"tax": "Taxes"})) == "Taxes"


def test_columns_that_texts_read_are_found() -> None:
    assert names_in(["{{ q.strip() }} {% for one in many %}{{ one }}{% endfor %}"], ["[A, B]", "row.get('x', category)"]) == {
        "q", "many", "A", "B",
    }  # fmt: skip
