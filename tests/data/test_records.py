import pytest

from swift.data.records import Message, Record, Rejected, fault, reasons, validate
from swift.errors import DataError

USER, ANSWER = Message("user", "q"), Message("assistant", "a")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([USER], "no assistant message"),
        ([USER, ANSWER, USER], "last message of the row is from user"),
        ([Message("wizard", "x"), ANSWER], "unknown role 'wizard'"),
        ([USER, Message("assistant", " \n")], r"message 2 \(assistant\) is empty"),
        ([Message("user", ""), ANSWER], r"message 1 \(user\) is empty"),
        ([USER, Message("system", "s"), ANSWER], "must be the first message"),
        ([ANSWER], "no user message"),
        ([USER, Message("assistant", "a", loss=False)], "nothing would be trained"),
        ([Message("user", "q", loss=True), ANSWER], "only assistant messages are trained"),
        ([USER, Message("assistant", "a", loss_scale=-1.0)], "negative loss_scale"),
    ],
)
def test_a_bad_sft_row_says_what_is_wrong(messages, reason):
    with pytest.raises(DataError, match=f"f:7: .*{reason}"):
        validate(Record(messages, source="f:7"), "sft")


def test_a_good_row_of_each_kind_is_accepted():
    rejected = [USER, Message("assistant", "b")]
    good = {
        "sft": Record([Message("system", ""), USER, ANSWER]),
        "pt": Record([ANSWER]),
        "preference": Record([USER, ANSWER], rejected=rejected),
        "kto": Record([USER, ANSWER], label=False),
        "grpo": Record([USER], extra={"solution": "4"}),
        "classify": Record([USER], label=[0, 1]),
        "embedding": Record([USER], positives=[[USER]], label=0.5),
        "reranker": Record([USER], positives=[[ANSWER]], negatives=[[ANSWER]]),
    }
    assert {want: fault(record, want) for want, record in good.items()} == dict.fromkeys(good)


@pytest.mark.parametrize(
    ("want", "record", "reason"),
    [
        ("pt", Record([USER, ANSWER]), "wants one text"),
        ("preference", Record([USER, ANSWER]), "no rejected answer"),
        ("preference", Record([USER, ANSWER], rejected=[USER, ANSWER]), "rejected answer equals the chosen one"),
        ("preference", Record([USER, ANSWER], rejected=[Message("user", "other"), Message("assistant", "b")]), "from message 1 on"),
        ("preference", Record([USER, ANSWER], rejected=[Message("system", "s"), USER, Message("assistant", "b")]), "from message 1 on"),
        ("preference", Record([USER, ANSWER], rejected=[Message("assistant", "b")]), "rejected conversation has no user message"),
        ("preference", Record([USER, ANSWER], rejected=[USER]), "rejected conversation has no assistant"),
        ("kto", Record([USER, ANSWER]), "no label"),
        ("kto", Record([USER, ANSWER], label="good"), "label is 'good'"),
        ("grpo", Record([USER, ANSWER]), "not from the user"),
        ("classify", Record([USER]), "no label"),
        ("classify", Record([USER], label="spam"), "not a number"),
        ("reranker", Record([USER]), "positive_messages and negative_messages"),
    ],
)
def test_a_row_that_does_not_fit_the_objective_says_why(want, record, reason):
    assert reason in (fault(record, want) or "")


def test_reasons_that_differ_in_numbers_only_are_counted_together():
    rejected = [Rejected("a:1", {}, "12 tokens"), Rejected("a:2", {}, "no label"), Rejected("a:3", {}, "15 tokens")]
    assert reasons(rejected) == [(2, "12 tokens", "a:1"), (1, "no label", "a:2")]


def test_what_an_agent_did_after_the_last_question_may_differ():
    tool = Message("tool", "snow")
    assert fault(Record([USER, ANSWER, tool, ANSWER], rejected=[USER, Message("assistant", "b")]), "preference") is None
