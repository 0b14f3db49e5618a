"""Guesses from what was said before."""

from swift.engine.native.ngram import Guesser


def test_what_followed_the_last_time_is_guessed():
    assert Guesser().guess([1, 2, 3, 4, 9, 1, 2], 3) == [3, 4, 9]
    assert Guesser().guess([1, 2, 3, 1, 2, 4, 1, 2], 1) == [4]


def test_a_longer_end_decides_before_a_shorter_one():
    assert Guesser().guess([7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2], 1) == [5]


def test_nothing_is_guessed_from_new_words():
    assert Guesser().guess([1, 2, 3], 4) == []
    assert Guesser().guess([], 4) == []


def test_tokens_that_arrive_later_are_remembered():
    guesser = Guesser()
    tokens = [1, 2, 3]
    assert guesser.guess(tokens, 2) == []
    tokens += [4, 1, 2]
    assert guesser.guess(tokens, 2) == [3, 4]
    tokens += [5, 1, 2]
    assert guesser.guess(tokens, 2) == [5, 1]
