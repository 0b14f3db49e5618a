from swift.data.records import Message, Record
from swift.data.render import render
from swift.data.tools import as_text, read_calls

TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
MESSAGES = [
    Message("user", "q"), Message("assistant", "", tool_calls=[CALL]), Message("tool", "cold"), Message("tool", "windy"),
    Message("assistant", "a"),
]  # fmt: skip


def test_a_template_without_tools_gets_them_as_text(tokenizer, trained):
    [example] = render(Record(MESSAGES, tools=TOOLS), tokenizer)
    text = tokenizer.decode(example.input_ids)
    assert text.startswith("<|im_start|>system\nYou can call the functions")
    assert '<tools>\n{"type": "function", "function": {"name": "weather"}}\n</tools>' in text
    assert "user\n<tool_response>\ncold\n</tool_response>\n<tool_response>\nwindy\n</tool_response><|im_end|>" in text
    assert trained(example) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
        "a<|im_end|>",
    ]


def test_a_template_with_tools_gets_them_as_they_are(tokenizer):
    template = (
        "{{ tools[0].function.name }}{% for message in messages %}[{{ message.role }}:{{ message.content }}"
        "{% if message.tool_calls %}{{ message.tool_calls[0].function.arguments.city }}{% endif %}]{% endfor %}"
        "{% if add_generation_prompt %}[assistant:{% endif %}"
    )
    [example] = render(Record(MESSAGES, tools=TOOLS), tokenizer, chat_template=template)
    assert tokenizer.decode(example.input_ids) == "weather[user:q][assistant:Oslo][tool:cold][tool:windy][assistant:a]<|im_end|>"


def test_a_template_that_joins_arguments_to_a_text_gets_json_text(tokenizer):
    template = (
        "{% if tools %}{% endif %}{% for message in messages %}[{{ message.role }}:"
        "{{ message.tool_calls[0].function.arguments + '!' if message.tool_calls else message.content }}]{% endfor %}"
        "{% if add_generation_prompt %}[assistant:{% endif %}"
    )
    [example] = render(Record(MESSAGES[:2]), tokenizer, chat_template=template)
    assert tokenizer.decode(example.input_ids) == '[user:q][assistant:{"city": "Oslo"}!]<|im_end|>'


def test_calls_are_read_back_from_text():
    text = as_text([message.for_template() for message in MESSAGES], None)[1]["content"]
    assert read_calls(text) == ("", [CALL])
    assert read_calls(f"let me see\n{text}") == ("let me see", [CALL])


def test_a_call_that_is_not_json_stays_in_the_text():
    text = "<tool_call>oops</tool_call>"
    assert read_calls(text) == (text, [])
    assert read_calls("plain ") == ("plain ", [])


def test_an_existing_system_prompt_is_kept_before_the_tools():
    [system, _] = as_text([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], TOOLS)
    assert system["content"].startswith("s\n\nYou can call")
