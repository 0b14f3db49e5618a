import json

import pytest

from swift import console
from swift.data.encode import encode
from swift.data.inspect import inspect, marked
from swift.data.records import Message, Record, Rejected


@pytest.fixture
def encoded(tokenizer):
    rows = [Record([Message("user", "hi"), Message("assistant", "yo \u96ea")], source="f:1")]
    return encode([*rows, Record([Message("user", "q"), Message("assistant", "x" * 99)], source="f:2")], tokenizer, max_length=40)


def test_trained_text_is_marked_when_piped(encoded, tokenizer, capsys):
    inspect(encoded, tokenizer, 5)
    out = capsys.readouterr().out
    assert "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[yo \u96ea<|im_end|>]]\n" in out
    assert "row 1 of 1" in out


def test_counts_lengths_and_reasons_are_shown(encoded, tokenizer, capsys):
    inspect(encoded, tokenizer, 0, rejected=[Rejected("f:3", {}, "the row has no assistant message")])
    out = capsys.readouterr().out
    assert "row 1" not in out
    for text in ("lengths", "rejected rows", "more than max_length 40", "the row has no assistant message", "f:3"):
        assert text in out


def test_json_mode_gives_events(encoded, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(console, "_json_mode", True)
    inspect(encoded, tokenizer, 1)
    row, lengths, summary, rejected = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["text"].endswith("[[yo \u96ea<|im_end|>]]\n")
    assert (lengths["title"], summary["title"], rejected["title"]) == ("lengths", "summary", "rejected")


def test_the_pieces_are_the_text(tokenizer):
    ids = tokenizer("ab cd ef")["input_ids"]
    labels = [-100 if index < 2 else token for index, token in enumerate(ids)]
    pieces = marked(ids, labels, tokenizer)
    assert ("".join(text for text, _ in pieces), [is_trained for _, is_trained in pieces]) == ("ab cd ef", [False, True])


def test_both_sides_of_a_pair_are_shown(tokenizer, capsys):
    pair = Record([Message("user", "q"), Message("assistant", "good")], rejected=[Message("user", "q"), Message("assistant", "bad")])
    inspect(encode([pair], tokenizer, max_length=None, objective="preference"), tokenizer, 1)
    out = capsys.readouterr().out
    assert "row 1 of 1 chosen" in out and "[[good<|im_end|>]]" in out
    assert "row 1 of 1 rejected" in out and "[[bad<|im_end|>]]" in out
