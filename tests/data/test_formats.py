import json

import pytest

from swift.data.formats import FORMATS, to_record
from swift.data.formats.base import Format
from swift.data.formats.common import build
from swift.data.records import Message
from swift.errors import DataError

U, A = Message("user", "q"), Message("assistant", "a")
WEATHER = {"name": "weather", "arguments": {"city": "Oslo"}}
CALL = {"type": "function", "function": WEATHER}


def texts(messages):
    return [(message.role, message.content) for message in messages]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversation": [{"human": "q", "assistant": "a"}]},
        {"query": "q", "response": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a"},
        {"problem": "q", "solution": "a"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "bot", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "q"}]}, {"role": "assistant", "content": "a"}]},
    ],
)
def test_every_layout_becomes_the_same_messages(row):
    record = to_record(row)
    assert (record.messages, record.extra) == ([U, A], {})


def test_system_history_and_other_columns():
    record = to_record({"system": "s", "query": "q2", "response": "a2", "history": [["q1", "a1"]], "id": 7})
    assert texts(record.messages) == [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    assert record.extra == {"id": 7}


def test_instruction_and_input_are_joined_by_a_newline():
    assert to_record({"instruction": "Translate.", "input": "hi", "output": "a"}).messages[0].content == "Translate.\nhi"


def test_the_known_name_wins_over_its_aliases_and_the_other_column_stays():
    record = to_record({"query": "q", "question": "other", "response": "a", "answer": "b"})
    assert (texts(record.messages), record.extra) == ([("user", "q"), ("assistant", "a")], {"question": "other", "answer": "b"})


def test_of_two_aliases_the_first_in_the_list_wins():
    record = to_record({"question": "other", "prompt": "q", "response": "a"})
    assert (record.messages[0].content, record.extra) == ("q", {"question": "other"})


def test_an_empty_known_column_gives_way_to_an_alias():
    assert to_record({"query": "", "prompt": "q", "response": "a"}).messages == [U, A]


def test_columns_renames_first():
    assert to_record({"text1": "q", "text2": "a"}, columns={"text1": "query", "text2": "response"}).messages == [U, A]


def test_extra_columns_of_a_row_with_messages_keep_their_names():
    row = {"messages": [{"role": "user", "content": "q"}], "solution": "4", "prompt": "p"}
    assert to_record(row).extra == {"solution": "4", "prompt": "p"}


def test_plain_text_is_one_assistant_message():
    assert to_record({"text": "hello", "url": "u"}).messages == [Message("assistant", "hello")]


def test_loss_and_loss_scale_are_kept():
    row = {
        "messages": [
            {"role": "user", "content": "q", "loss_weight": 0.0},
            {"role": "assistant", "content": "a", "loss": False},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "loss_scale": 2},
        ]
    }
    assert [(message.loss, message.loss_scale) for message in to_record(row).messages] == [
        (None, 0.0), (False, None), (None, None), (None, 2.0),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["tool_call", "function_call", "function-call", "tool-call"])
def test_a_tool_call_message_becomes_tool_calls_of_the_assistant(name):
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": name, "value": json.dumps(WEATHER)},
            {"from": "observation", "value": "cold"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps([{"name": "weather", "parameters": {"type": "object"}}]),
    }
    record = to_record(row)
    assert record.messages == [U, Message("assistant", "", tool_calls=[CALL]), Message("tool", "cold"), A]
    assert record.tools == [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_calls_in_a_row_and_the_text_before_them_are_one_message():
    call = {"role": "tool_call", "content": json.dumps(WEATHER)}
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "let me see"}, call, call]}
    assert to_record(row).messages == [U, Message("assistant", "let me see", tool_calls=[CALL, CALL])]


def test_openai_tool_calls_get_arguments_as_an_object():
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "cold"},
        ]
    }
    messages = to_record(row).messages
    assert messages[1] == Message("assistant", "", tool_calls=[{"id": "c1", **CALL}])
    assert messages[2] == Message("tool", "cold", tool_call_id="c1")


def test_anthropic_blocks():
    row = {
        "system": [{"type": "text", "text": "s"}],
        "tools": [{"name": "weather", "description": "d", "input_schema": {"type": "object"}}],
        "messages": [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm"},
                    {"type": "text", "text": "wait"},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "cold"}, {"type": "text", "text": "and?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ],
    }
    record = to_record(row)
    assert record.messages == [
        Message("system", "s"),
        U,
        Message("assistant", "<think>\nhm\n</think>\n\nwait", tool_calls=[{"id": "t1", **CALL}]),
        Message("tool", "cold", tool_call_id="t1"),
        Message("user", "and?"),
        A,
    ]
    assert record.tools == [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "response": "a", "rejected_response": "b"},
        {"query": "q", "response": "a", "rejected_response": [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "rejected_response": "b"},
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "rejected_messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
        },
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
        },
        {
            "chosen_messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "rejected_messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
        },
    ],
)
def test_every_layout_of_a_pair_becomes_two_whole_conversations(row):
    record = to_record({**row, "margin": 1})
    assert (record.messages, record.rejected, record.margin) == ([U, A], [U, Message("assistant", "b")], 1.0)


def test_the_system_prompt_is_on_both_sides_of_a_pair():
    record = to_record({"system": "s", "query": "q", "response": "a", "rejected_response": "b"})
    assert [side[0] for side in (record.messages, record.rejected)] == [Message("system", "s")] * 2


def test_kto_labels_are_read_under_both_names_and_as_text():
    labels = [True, False, "true", "False", 1]
    assert [to_record({"query": "q", "response": "a", "label": label}).label for label in labels] == [True, False, True, False, 1]
    assert to_record({"query": "q", "response": "a", "kto_tag": False}).label is False


def test_markers_and_files_are_put_in_one_order():
    row = {"query": "<image>one and <image>two", "response": "a", "images": ["1.png", "2.png"]}
    record = to_record(row)
    assert record.messages[0].content == [
        {"type": "image"}, {"type": "text", "text": "one and "}, {"type": "image"}, {"type": "text", "text": "two"},
    ]  # fmt: skip
    assert record.images == ["1.png", "2.png"]


def test_a_file_without_a_marker_goes_before_the_first_user_text():
    record = to_record({"query": "q", "response": "a", "image": "1.png"})
    assert record.messages[0].content == [{"type": "image"}, {"type": "text", "text": "q"}]


def test_more_markers_than_files_is_an_error_and_markers_without_files_are_text():
    with pytest.raises(DataError, match="name 2 images, the row has 1"):
        to_record({"query": "<image><image>", "response": "a", "images": ["1.png"]})
    assert to_record({"query": "what is <image> in HTML?", "response": "a"}).messages[0].content == "what is <image> in HTML?"


def test_openai_and_anthropic_image_parts_become_files():
    parts = [
        {"type": "image_url", "image_url": {"url": "https://h/1.png"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}},
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "mp3"}},
        {"type": "text", "text": "q"},
    ]
    record = to_record({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]})
    assert (record.images, record.audios) == (["https://h/1.png", "data:image/png;base64,QUJD"], ["data:audio/mp3;base64,QUJD"])
    assert [part["type"] for part in record.messages[0].content] == ["image", "image", "audio", "text"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "is a str, not an object"),
        ({}, "no known layout"),
        ({"foo": 1}, "no known layout has the columns foo"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "message 1 has the unknown role 'wizard'"),
        ({"messages": ["hi"]}, "message 1 is a str"),
        ({"messages": [{"content": "x"}]}, "message 1 has no role"),
        ({"messages": "[oops"}, "messages is a text that is not JSON"),
        ({"messages": 3}, "messages is a int, not a list"),
        ({"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, "unknown type 'hologram'"),
        ({"messages": [{"role": "tool_call", "content": "not json"}]}, "is not JSON"),
        ({"messages": [{"role": "assistant", "content": "a", "loss": "yes"}]}, "loss 'yes', not true or false"),
        ({"query": "q", "response": {"a": 1}}, "response is a dict"),
        ({"query": 5, "response": "a"}, "query is a int"),
        ({"query": "q", "response": "a", "history": ["x"]}, r"history\[0\] is not"),
        ({"query": "q", "response": "a", "tools": "{"}, "tools is not JSON"),
        ({"query": "q", "response": "a", "tools": [{"description": "d"}]}, r"tools\[0\] has no name"),
        ({"query": "q", "response": "a", "objects": [1]}, "objects is a list, not an object"),
        ({"query": "q", "response": "a", "margin": "wide"}, "margin is 'wide'"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
    ],
)
def test_a_row_that_cannot_be_converted_says_why(row, reason):
    with pytest.raises(DataError, match=reason):
        to_record(row)


def test_a_plug_in_format_is_asked_first(monkeypatch):
    def convert(row):
        return build(row, [Message("user", row.pop("ask")), Message("assistant", row.pop("say"))])

    monkeypatch.setitem(FORMATS._members, "mine", Format(lambda columns: "ask" in columns, convert))
    assert to_record({"ask": "q", "say": "a", "text": "other"}).messages == [U, A]
