"""Numbers, texts, code, yes and no, and JSON in answers as models write them; what is right is a reader's."""

import pytest

from swift.errors import ConfigError
from swift.evaluate.extract import EXTRACTORS
from swift.evaluate.extract.number import value_of
from swift.evaluate.judging import Question, Setting

NUMBERS = [
    ("16 - 3 - 4 = 9. 9 * 2 = 18\n#### 18", "18", "####"),
    ("#### $1,234.50", "1234.50", "####"),
    ("#### -7 degrees", "-7", "####"),
    ("#### 18\n\nQuestion: 5 birds\n#### 5", "18", "####"),
    ("####\nThe total is 12 apples", "12", "last number"),
    ("#### **18**", "18", "####"),
    ("#### Step 1: Add\n3 + 4 = 7\n#### Step 2: Double\n2 * 7 = 14", "14", "last number"),
    ("#### 1. Add\n3 + 4 = 7\n#### 7", "7", "####"),
    ("so \\boxed{1\\,000} no, \\boxed{42}", "42", "boxed"),
    ("\\boxed{\\frac{3}{4}}", "3/4", "boxed"),
    ("\\boxed{-\\dfrac{3}{4}}", "-3/4", "boxed"),
    ("The answer is 20 dollars, out of 100.", "20", "statement"),
    ("The answer is 3 + 4 = 7.", "7", "statement"),
    ("The answer is: $0.50.", "0.50", "statement"),
    ("答案是 36 个，共 3 盒", "36", "statement"),
    ("答案：１２", "12", "statement"),
    (f"The answer is {'more or less ' * 4}some 1234.", "1234", "statement"),
    ("The total is 12 apples. He eats 5, so 7 are left.", "7", "last number"),
    ("The area is 24 m².", "24", "last number"),
    ("She makes $18 every day.", "18", "last number"),
    ("She sells 1,000 eggs for 2 dollars each, so 2,000.", "2000", "last number"),
    ("That is -5", "-5", "last number"),
    ("−5", "-5", "last number"),
    ("from 10-20", "20", "last number"),
    ("7-3", "3", "last number"),
    ("-$3.50", "-3.50", "last number"),
    ("$-3.50", "-3.50", "last number"),
    ("it is 1/2", "1/2", "last number"),
    (".5 litres", "0.5", "last number"),
    ("about 1.5e3 of them", "1.5e3", "last number"),
    ("In 50% of cases.", "50", "last number"),
    ("It costs 3.", "3", "last number"),
    ("x = 1, 2, 3", "3", "last number"),
    ("12,34", "34", "last number"),
]


def found(name, text, question=None, **options):
    made = EXTRACTORS.get(name)(Setting("t", options))(text, question or Question())
    return made.value, made.rule


@pytest.mark.parametrize(("text", "value", "rule"), NUMBERS)
def test_the_number_that_a_reader_sees_is_found(text, value, rule):
    assert found("number", text) == (value, rule)


@pytest.mark.parametrize(("text", "reason"), [("", "the answer is empty"), ("No idea.", "no number"), ("#### none", "no number")])
def test_an_answer_without_a_number_is_told_apart(text, reason):
    assert found("number", text) == (None, reason)


@pytest.mark.parametrize(
    ("text", "value"), [("1,000", 1000), ("$3.50", 3.5), ("50%", 50), ("1/4", 0.25), ("−2", -2), ("-$2", -2), ("1e3", 1000), ("7.", 7)]
)
def test_a_number_has_its_value(text, value):
    assert value_of(text) == value


@pytest.mark.parametrize("text", ["", "seven", "1/0", "1.2.3", "-", "1,2", "10²", "1e999999999"])
def test_what_is_no_number_has_no_value(text):
    assert value_of(text) is None


@pytest.mark.parametrize(
    ("text", "value", "rule"),
    [
        ("Thus $x = \\boxed{\\frac{\\sqrt{3}}{2}}$.", "\\frac{\\sqrt{3}}{2}", "boxed"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}", "boxed"),
        ("\\boxed 7$", "7", "boxed"),
        ("The answer is $x^2$. Good.", "$x^2$", "statement"),
        ("The answer is **5**.", "5", "statement"),
        ("we get 5", "5", "last number"),
        ("\\boxed{}", None, "the box is empty"),
        ("\\boxed{7", "7", "last number"),
        ("no value", None, "neither a box nor a number"),
    ],
)
def test_the_value_of_a_box_is_found_with_balanced_braces(text, value, rule):
    assert found("math", text) == (value, rule)


CODE = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (f"Here it is:\n```python\n{CODE}```\nDone.", CODE),
        (f"```\n{CODE}```", CODE),
        (f"```python\n{CODE}", CODE),
        (f"```bash\npip install x\n```\n```py\n{CODE}```", CODE),
        (f"```python\nimport os\n```\nand\n```python\n{CODE}```\n```python\nprint(add(1, 2))\n```", CODE),
        ("1. So:\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n", CODE),
        ("```python\n    return a + b\n```", "    return a + b\n"),
        ("    return a + b", "    return a + b"),
        ("    return a + b\n```\nThis adds.", "    return a + b"),
    ],
)
def test_code_is_the_block_that_defines_the_function(text, value):
    assert found("code", text, Question(fields={"entry_point": "add"}))[0] == value


def test_code_of_another_language_is_none():
    assert found("code", "```java\nint add() {}\n```") == (None, "no code block of Python")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Yes, it is.", "yes"),
        ("**No**", "no"),
        ("Incorrect.", "no"),
        ("是的。", "yes"),
        ("不是", "no"),
        ("不正确", "no"),
        ("It says so; the answer is yes, no doubt", "yes"),
        ("The text says that it is true.", "yes"),
        ("The text says that it is not true.", "no"),
        ("That isn't correct.", "no"),
        ("答案：错", "no"),
        ("yes or no?", "yes"),
        ("Nothing is known", None),
        ("It may be true or false", None),
        ("", None),
    ],
)
def test_yes_and_no_are_told_apart(text, value):
    assert found("yes_no", text)[0] == value


@pytest.mark.parametrize(
    ("text", "options", "value"),
    [
        ('Sure: {"b": [1], "a": "x"}.', {}, '{"a": "x", "b": [1]}'),
        ('```json\n{"answer": "B"}\n```', {"key": "answer"}, "B"),
        ('{"answer": 3}', {"key": "answer"}, "3"),
        ('{"other": 3}', {"key": "answer"}, None),
        ("{not json} [1, 2]", {}, "[1, 2]"),
        ("none", {}, None),
    ],
)
def test_json_is_found_in_text(text, options, value):
    assert found("json", text, **options)[0] == value


def test_a_regex_takes_the_match_that_is_wanted():
    assert found("regex", "a1 a2 a3", pattern=r"a(\d)") == ("3", "regex")
    assert found("regex", "a1 a2 a3", pattern=r"a(\d)", select=0) == ("1", "regex")
    assert found("regex", "a1", pattern=r"a(\d)", select=1) == (None, "1 matches")
    assert found("regex", "none", pattern=r"a(\d)") == (None, "no match")


def test_a_regex_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"'\(' is no regular expression"):
        found("regex", "", pattern="(")
    with pytest.raises(ConfigError, match="select of the extractor regex is 'first'"):
        found("regex", "", pattern="a", select="first")
    with pytest.raises(ConfigError, match="needs a pattern"):
        found("regex", "")


def test_text_and_first_line():
    assert found("text", " two\nlines ") == ("two\nlines", "text")
    assert found("first_line", "\n two\nlines") == ("two", "first line")
    assert found("text", " \n") == (None, "the answer is empty")
