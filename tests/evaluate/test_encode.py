"""Tokens of contexts and continuations, worked by hand with a tokenizer of nine tokens."""

from typing import Any

import pytest

from swift.engine.scoring import Text
from swift.errors import DataError
from swift.evaluate.encode import Encoder, cut, fitted
from swift.evaluate.prompt import Prompt, Shot

X, A, B, SPACE, AB, SPACE_A, NEWLINE, BOS, EOS = range(9)


def make_tokenizer(*, adds_first: bool = False) -> Any:
    """Letters, with the merges a+b and space+a; ``adds_first``: it puts <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"x": X, "a": A, "b": B, " ": SPACE, "ab": AB, " a": SPACE_A, "\n": NEWLINE, "<s>": BOS, "</s>": EOS}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), (" ", "a")]))
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["<s>", "</s>"])
    if adds_first:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False)


def test_spaces_at_the_end_of_the_context_move_to_the_continuation() -> None:
    # "x " + "a" is read as "x" and " a": one token that the space is part of.
    assert Encoder(make_tokenizer()).pairs([("x ", "a")]) == ([Text((X, SPACE_A), 1)], 0)


def test_context_and_continuation_are_tokenized_together() -> None:
    # "x" + " ab" = x, then space ab, not " a" b.
    assert Encoder(make_tokenizer()).pairs([("x", " ab"), ("xx", "ab")]) == ([Text((X, SPACE, AB), 1), Text((X, X, AB), 2)], 0)


def test_a_continuation_loses_what_the_tokenizer_joins_to_the_context_as_in_lm_eval() -> None:
    # "xa" + "bb" = x ab b: beyond the two tokens of "xa" (x a) there is one b. lm-eval 0.4.13 computes x a b, and scores the last.
    assert Encoder(make_tokenizer()).pairs([("xa", "bb"), ("xa", "x")]) == ([Text((X, A, B), 2), Text((X, A, X), 2)], 1)


def test_a_continuation_that_would_lose_all_keeps_its_tokens() -> None:
    # "xa" + "b" = x ab: two tokens, as many as the context alone.
    assert Encoder(make_tokenizer()).pairs([("xa", "b")]) == ([Text((X, A, B), 2)], 1)


@pytest.mark.parametrize("context", ["xa", ""])
def test_a_continuation_without_text_is_refused(context: str) -> None:
    with pytest.raises(DataError, match="'' has no token after the question"):
        Encoder(make_tokenizer()).pairs([(context, "")])


def test_after_nothing_stands_the_first_token() -> None:
    assert Encoder(make_tokenizer()).pairs([("", " ab"), ("", "<s>x")]) == ([Text((BOS, SPACE, AB), 1), Text((BOS, X), 1)], 0)


def test_special_tokens_are_added_once() -> None:
    encoder = Encoder(make_tokenizer(adds_first=True))
    assert encoder.pairs([("x", "b")]) == ([Text((BOS, X, B), 2)], 0)
    assert encoder.pairs([("<s>x", "b")]) == ([Text((BOS, X, B), 2)], 0)
    assert encoder.pairs([("", "b")]) == ([Text((BOS, B), 1)], 0)


def test_windows_score_each_token_once_and_the_last_reaches_back() -> None:
    # 7 tokens, 3 computed at a time: <s>xa|x, then the two last windows, as lm-eval's get_rolling_token_windows gives them:
    # ([<s> x b] -> x b x), ([x b x] -> b x b), ([x b x] ... the last one has one new token and two before it).
    windows = Encoder(make_tokenizer()).document("xbxbxbx", 3)
    assert windows == [Text((BOS, X, B, X), 1), Text((X, B, X, B), 1), Text((B, X, B, X), 3)]
    assert sum(len(window.tokens) - window.start for window in windows) == 7


def test_a_first_token_that_the_tokenizer_adds_is_not_scored() -> None:
    assert Encoder(make_tokenizer(adds_first=True)).document("xb", 8) == [Text((BOS, X, B), 1)]


def test_an_empty_document_is_refused() -> None:
    with pytest.raises(DataError, match="the text is empty"):
        Encoder(make_tokenizer()).document("", 8)


def test_solved_examples_are_left_out_from_the_first_on_and_then_the_beginning_is_cut() -> None:
    encoder = Encoder(make_tokenizer())
    prompt = Prompt("xx", shots=(Shot("xb", "x"), Shot("bb", "x")), delimiter="", separator="\n")

    def encode(prompt: Prompt) -> list[Text]:
        return encoder.pairs([(prompt.plain(), "b")])[0]

    # Whole: x b x NL b b x NL x x b, of which 10 are computed.
    assert fitted(prompt, 10, encode).notes == {}
    one_left = fitted(prompt, 9, encode)
    assert one_left.notes == {"shots_left_out": 1}
    assert one_left.texts == (Text((B, B, X, NEWLINE, X, X, B), 6),)
    short = fitted(prompt, 1, encode)
    assert short.notes == {"shots_left_out": 2, "truncated": 1}
    assert short.texts == (Text((X, B), 1),)


def test_a_continuation_longer_than_the_model_is_refused() -> None:
    with pytest.raises(DataError, match="the text to score has 3 tokens, the model reads 2"):
        cut(Text((X, A, B, X), 1), 2)
