"""The letter of a choice in answers as models write them; the right letters are a reader's."""

import pytest

from swift.errors import ConfigError
from swift.evaluate.extract import EXTRACTORS
from swift.evaluate.extract.thinking import without_thinking
from swift.evaluate.judging import Question, Setting

CAPITALS = Question("ABCD", ("London", "Berlin", "Paris", "A Tale of Two Cities"))

SAID = [
    ("B", "B", "beginning"),
    ("b", "B", "beginning"),
    ("(b)", "B", "beginning"),
    (" C.", "C", "beginning"),
    ("**B**", "B", "beginning"),
    ("B. Berlin", "B", "beginning"),
    ("B) Berlin is the largest", "B", "beginning"),
    ("(D) because the others are wrong", "D", "beginning"),
    ("B\n\nExplanation: A and C are further west.", "B", "beginning"),
    ("B because A is wrong", "B", "beginning"),
    ("C、因为其他选项不符合", "C", "beginning"),
    ("B选项，因为它最大", "B", "beginning"),
    ("The answer is (B).", "B", "statement"),
    ("The answer is B", "B", "statement"),
    ("The correct answer is: **C**. A is only the second.", "C", "statement"),
    ("Answer: D", "D", "statement"),
    ("ANSWER: d", "D", "statement"),
    ("answer: $B$", "B", "statement"),
    ("Let us think. A is too small, D is no city. So the answer is therefore option (C).", "C", "statement"),
    ("The answer is not A, it is B.", "B", "statement"),
    ("The answer is A. Wait, no. The answer is C.", "C", "statement"),
    ("I would choose option D here.", "D", "statement"),
    ("The best choice is B, I think", "B", "statement"),
    ("After all that, (B) is the correct one", "B", "statement"),
    ("Option A is correct.", "A", "statement"),
    ("A is the right answer", "A", "statement"),
    ("答案：B", "B", "statement"),
    ("答案:Ｂ", "B", "statement"),
    ("答案是（C）。", "C", "statement"),
    ("正确答案为选项D", "D", "statement"),
    ("因此，本题应选 B", "B", "statement"),
    ("选 B", "B", "statement"),
    ("故选：C。", "C", "statement"),
    ("我选择A，因为它符合题意", "A", "statement"),
    ("A选项错误，B选项错误，D选项错误，所以C项正确", "C", "statement"),
    ("不选A，选D", "D", "statement"),
    ("正确的是B", "B", "statement"),
    ("So we get $\\boxed{B}$, not A", "B", "boxed"),
    ("\\boxed{\\text{(C)}}", "C", "boxed"),
    ("Paris", "C", "the text of a choice"),
    ("The answer is Paris.", "C", "the text of a choice"),
    ("A Tale of Two Cities", "D", "the text of a choice"),
    ("It must be **B. Berlin** in my view", "B", "emphasis"),
    ("I considered A, but in the end it has to be C", "C", "last letter"),
    ("Probably D, certainly not A", "D", "last letter"),
    ("option (b)", "B", "statement"),
    ("The answer is b.", "B", "statement"),
    ("The answer is 'B'.", "B", "statement"),
    ("b) Berlin, it is", "B", "beginning"),
    ("So $\\boxed{b}$", "B", "boxed"),
    ("The answer is \\(B\\).", "B", "statement"),
    ('{"answer": "B"}', "B", "statement"),
    ("选A不选B", "A", "statement"),
    ("正确答案不是A，而是B", "B", "last letter"),
    ("Answer:\nB", "B", "statement"),
    ("B和C都不对，应选A", "A", "statement"),
]

NOTHING = [
    ("", "the answer is empty"),
    ("   \n", "the answer is empty"),
    ("I do not know the answer.", "no letter of a choice"),
    ("Apple", "no letter of a choice"),
    ("The answer is Apple", "no letter of a choice"),
    ("Because Dogs bark", "no letter of a choice"),
    ("A dog is not a city", "no letter of a choice"),
    ("The answer is a number", "no letter of a choice"),
    ("E", "no letter of a choice"),
    ("Use C++ or C#.", "no letter of a choice"),
    ("It is B-grade, on DVD", "no letter of a choice"),
    ("The U.S.A. and the BBC", "no letter of a choice"),
    ("The answer is A or B", "several letters are named"),
    ("答案是A和C", "several letters are named"),
    ("A, B", "several letters are named"),
    ("C or D", "several letters are named"),
    ("As an AI, I cannot tell", "no letter of a choice"),
    ("A. London\nB. Berlin\nC. Paris\nD. none", "no letter of a choice"),
    ("a) London\nb) Berlin\nc) Paris\nd) none", "no letter of a choice"),
    ("The answer is a\nnumber of A's friends", "no letter of a choice"),
    ("答案：ABD", "no letter of a choice"),
    ("The answer is not (A)", "no letter of a choice"),
    ("不选B", "no letter of a choice"),
]


def extractor(name, **options):
    return EXTRACTORS.get(name)(Setting("t", options))


@pytest.mark.parametrize(("text", "letter", "rule"), SAID)
def test_the_letter_that_a_reader_sees_is_found(text, letter, rule):
    found = extractor("letter")(text, CAPITALS)
    assert (found.value, found.rule) == (letter, rule)


@pytest.mark.parametrize(("text", "reason"), NOTHING)
def test_an_answer_without_a_letter_is_told_apart_with_a_reason(text, reason):
    found = extractor("letter")(text, CAPITALS)
    assert (found.value, found.rule) == (None, reason)


def test_the_last_letter_is_not_taken_if_the_declaration_says_so():
    found = extractor("letter", last=False)("In the end it has to be C", CAPITALS)
    assert (found.value, found.rule) == (None, "no letter of a choice")


def test_letters_are_those_that_the_question_has():
    assert extractor("letter")("The answer is E.", Question("ABCDE")).value == "E"
    assert extractor("letter")("The answer is D.", Question("ABC")).value is None


@pytest.mark.parametrize(
    ("text", "rest", "said"),
    [
        ("<think>The answer is A.</think>\nThe answer is B.", "The answer is B.", None),
        ("so it is A</think> B", "B", None),
        ("<think>A, or B, or", "", "the thinking has no end"),
        ("<Thinking>A</Thinking>C", "C", None),
        (" B ", " B ", None),
    ],
)
def test_thinking_is_not_read(text, rest, said):
    assert without_thinking(text) == (rest, said)


def test_unknown_names_and_options_get_a_near_match():
    with pytest.raises(ConfigError, match="unknown extractor 'leter'") as caught:
        EXTRACTORS.get("leter")
    assert caught.value.hint == "did you mean 'letter'?"
    with pytest.raises(ConfigError, match="task t: unknown option 'lst'") as caught:
        extractor("letter", lst=1)
    assert caught.value.hint == "did you mean 'last'?"
