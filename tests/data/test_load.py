import json

import pytest

from swift.data.load import load_records, write_rejected
from swift.data.records import Rejected
from swift.errors import ConfigError, DataError
from tests.data.conftest import chat


def questions(records):
    return [record.messages[0].content for record in records]


def numbered(n):
    return [chat(f"q{index}", f"a{index}") for index in range(n)]


def test_rows_become_records_that_know_their_position(write):
    path = write(numbered(2))
    loaded = load_records([path], shuffle=False)
    assert [record.source for record in loaded.train] == [f"{path}:1", f"{path}:2"]
    assert (loaded.validation, loaded.rejected) == ([], [])


def test_bad_rows_are_kept_with_their_reason_and_counted(write, capsys):
    path = write([*numbered(19), chat("no answer")])
    loaded = load_records([path])
    assert (len(loaded.train), [item.reason for item in loaded.rejected]) == (19, ["the row has no assistant message"])
    assert f"1 of 20 rows are rejected: 1 x the row has no assistant message ({path}:20)" in capsys.readouterr().err


def test_too_many_bad_rows_are_an_error_that_names_the_first(write):
    path = write([*numbered(8), chat("no answer"), chat("none here")])
    with pytest.raises(DataError, match=r"2 of 10 rows are rejected, more than 10%: 2 x .*rows.jsonl:9"):
        load_records([path])
    assert len(load_records([path], max_rejected=0.2).rejected) == 2


def test_strict_stops_at_the_first_bad_row(write):
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the row has no assistant message"):
        load_records([write([*numbered(1), chat("no answer"), *numbered(30)])], strict=True)


def test_a_set_of_which_nothing_is_left_is_an_error(write):
    with pytest.raises(DataError, match="no row is left to train on"):
        load_records([write([chat("q")])], max_rejected=1.0)
    with pytest.raises(DataError, match="no row is left in the validation set"):
        load_records([write(numbered(3))], val_datasets=[write([chat("q")], "val.jsonl")], max_rejected=1.0)


def test_shuffling_is_seeded(write):
    path = write(numbered(50))
    first, again = (questions(load_records([path], data_seed=1).train) for _ in range(2))
    assert first == again
    assert first != questions(load_records([path], data_seed=2).train)
    assert sorted(first) == sorted(questions(load_records([path], shuffle=False).train))


def test_a_split_is_deterministic_disjoint_and_complete(write):
    path = write(numbered(50))
    loaded = load_records([path], split_ratio=0.1)
    assert (len(loaded.train), len(loaded.validation)) == (45, 5)
    assert sorted(questions(loaded.train) + questions(loaded.validation)) == sorted(f"q{index}" for index in range(50))
    assert questions(load_records([path], split_ratio=0.1).validation) == questions(loaded.validation)


def test_equal_rows_are_on_one_side_of_a_split(write):
    loaded = load_records([write(numbered(10) * 3)], split_ratio=0.2)
    assert len(loaded.validation) == 6
    assert not {*questions(loaded.train)} & {*questions(loaded.validation)}


def test_a_split_holds_the_same_rows_whatever_the_objective(write):
    path = write([chat("same question", f"a{index}") for index in range(20)])
    held = load_records([path], split_ratio=0.2).validation
    prompts = load_records([path], split_ratio=0.2, want="grpo").validation
    assert [record.messages[-1].content for record in held] == [record.extra["response"] for record in prompts]


def test_a_split_that_takes_everything_is_an_error(write):
    with pytest.raises(DataError, match="leaves nothing to train on: 3 rows, 1 distinct"):
        load_records([write(numbered(1) * 3)], split_ratio=0.5)


def test_a_sample_is_taken_by_seed_or_from_the_beginning(write):
    path = write(numbered(50))
    sample = questions(load_records([f"{path}#5"]).train)
    assert (len({*sample}), sample) == (5, questions(load_records([f"{path}#5"]).train))
    assert questions(load_records([f"{path}#5"], shuffle=False).train) == ["q0", "q1", "q2", "q3", "q4"]


def test_a_sample_larger_than_the_set_repeats_it(write):
    path = write(numbered(3))
    assert questions(load_records([f"{path}#7"], shuffle=False).train) == ["q0", "q1", "q2", "q0", "q1", "q2", "q0"]


def test_repeated_rows_never_reach_both_sides_of_a_split(write):
    loaded = load_records([f"{write(numbered(4))}#20"], split_ratio=0.25)
    assert (len(loaded.train), len(loaded.validation)) == (19, 1)
    assert not {*questions(loaded.train)} & {*questions(loaded.validation)}


def test_several_sets_are_joined_in_order(write):
    first, second = write(numbered(2), "a.jsonl"), write([chat("other", "a")], "b.jsonl")
    assert questions(load_records([first, second], shuffle=False).train) == ["q0", "q1", "other"]


def test_the_system_prompt_is_for_rows_without_one(write):
    own = {"messages": [{"role": "system", "content": "own"}, *chat("q", "a")["messages"]]}
    loaded = load_records([write([own, chat("q", "a")])], system="given", shuffle=False)
    assert [record.messages[0].content for record in loaded.train] == ["own", "given"]


def test_name_and_author_are_filled_in_the_language_of_the_row(write):
    rows = [chat("who?", "I am {{NAME}} of {{ AUTHOR }}."), chat("\u4f60\u662f\u8c01", "\u6211\u662f{{name}}")]
    loaded = load_records([write(rows)], model_name=["\u5c0f\u96ea", "Snow"], model_author="us", shuffle=False)
    assert [record.messages[1].content for record in loaded.train] == ["I am Snow of us.", "\u6211\u662f\u5c0f\u96ea"]


def test_placeholders_without_a_name_are_told(write, capsys):
    load_records([write([chat("who?", "I am {{NAME}}.")])])
    assert "1 rows hold {{NAME}} or {{AUTHOR}}: give --model_name and --model_author" in capsys.readouterr().err


def test_a_grpo_row_keeps_its_answer_and_columns_for_the_rewards(write):
    record = load_records([write([{"problem": "2+2", "solution": "4", "level": 1}])], want="grpo").train[0]
    assert [message.role for message in record.messages] == ["user"]
    assert record.extra == {"response": "4", "solution": "4", "level": 1}


def test_a_labelled_text_is_what_is_classified(write):
    record = load_records([write([{"text": "great film", "label": 1}])], want="classify").train[0]
    assert (record.messages[0].role, record.messages[0].content, record.label) == ("user", "great film", 1)


def test_columns_that_no_row_has_are_an_error(write):
    with pytest.raises(DataError, match="'quary', which no row has") as caught:
        load_records([write([{"query2": "q", "query": "q", "response": "a"}])], columns={"quary": "query"})
    assert caught.value.hint == "did you mean 'query'?"


def test_a_media_file_beside_the_data_is_found(write, tmp_path):
    write(b"x", "pictures/1.png")
    path = write([{"query": "<image>q", "response": "a", "images": ["pictures/1.png"]}])
    assert load_records([path]).train[0].images == [str(tmp_path / "pictures/1.png")]


def test_a_column_that_lost_against_another_is_told(write, capsys):
    load_records([write([{"prompt": "q", "question": "other", "response": "a"}])])
    assert "question not used, another column has the same meaning" in capsys.readouterr().err
    load_records([write([{"query": "q", "response": "a", "id": 1}])])
    assert "not used" not in capsys.readouterr().err


def test_rejected_answers_that_are_not_trained_on_are_told(write, capsys):
    path = write([{"query": "q", "response": "a", "rejected_response": "b"}, {"query": "q", "response": "a"}])
    load_records([path])
    assert "1 rows have a rejected answer, which is not used" in capsys.readouterr().err
    load_records([path], want="preference", max_rejected=0.5)
    assert "not used" not in capsys.readouterr().err


def test_half_a_surrogate_pair_is_rejected_and_can_be_written_down(write, tmp_path):
    path = write('{"query": "bad \\ud83d", "response": "a"}\n{"query": "good \\ud83d\\ude00", "response": "a"}\n')
    loaded = load_records([path], max_rejected=0.5)
    assert questions(loaded.train) == ["good \U0001f600"]
    assert "half of a surrogate pair" in loaded.rejected[0].reason
    write_rejected(tmp_path / "rejected.jsonl", loaded.rejected)
    assert "ud83d" in (tmp_path / "rejected.jsonl").read_text(encoding="utf-8")


def test_kto_labels_are_booleans(write):
    rows = [{"query": "q", "response": "a", "label": label} for label in (0, 1, True, 1.0)]
    assert [record.label for record in load_records([write(rows)], want="kto", shuffle=False).train] == [False, True, True, True]


@pytest.mark.parametrize(
    "options", [{"want": "dance"}, {"split_ratio": 0.1, "val_datasets": ["x"]}, {"split_ratio": 1.5}, {"model_name": ["a", "b", "c"]}]
)
def test_options_that_cannot_go_together_are_refused_before_anything_is_read(options):
    with pytest.raises(ConfigError):
        load_records(["does-not-exist.jsonl"], **options)
    with pytest.raises(ConfigError, match="no data set"):
        load_records([])


def test_rejected_rows_are_written_one_a_line(tmp_path):
    write_rejected(tmp_path / "run" / "rejected.jsonl", [Rejected("f:1", {"q": "\u96ea"}, "bad"), Rejected("f:2", {3}, "odd")])
    lines = (tmp_path / "run" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"source": "f:1", "reason": "bad", "row": {"q": "\u96ea"}},
        {"source": "f:2", "reason": "odd", "row": "{3}"},
    ]
