"""Text while it is written."""

import pytest

from swift.engine.writer import Writer
from tests.tiny import make_tokenizer


def written(pieces, stop_words=()):
    """Pieces given as tokens that decode to them."""
    writer = Writer(lambda ids: "".join(pieces[token] for token in ids), stop_words)
    given = [writer.add([number]) for number in range(len(pieces))]
    return [*given, writer.end()], writer.stopped_by


@pytest.mark.parametrize(
    ("pieces", "given", "stopped_by"),
    [
        (["ab", "cEN", "Dxy"], ["ab", "c", "", ""], "END"),  # a stop word over two pieces
        (["ab", "EN", "x"], ["ab", "", "ENx", ""], None),  # only its beginning
        (["ab", "EN"], ["ab", "", "EN"], None),  # its beginning at the very end
        (["END", "x"], ["", "", ""], "END"),
        (["aSTOP END"], ["a", ""], "STOP"),  # the first of two
    ],
)
def test_text_ends_before_a_stop_word(pieces, given, stopped_by):
    assert written(pieces, ["END", "STOP"]) == (given, stopped_by)


def test_a_character_of_several_tokens_comes_whole():
    tokenizer = make_tokenizer()
    text = "Snow 雪 and ❄️ fall. ñ"
    writer = Writer(lambda ids: tokenizer.decode(ids))
    given = [writer.add([token]) for token in tokenizer(text).input_ids]
    assert "".join([*given, writer.end()]) == text
    assert not any("\ufffd" in piece for piece in given)


def test_half_a_character_at_the_end_is_shown_as_such():
    tokenizer = make_tokenizer()
    writer = Writer(lambda ids: tokenizer.decode(ids))
    half = tokenizer("a雪").input_ids[:-1]
    assert "".join([writer.add([token]) for token in half]) == "a"
    assert writer.end() == "\ufffd"
