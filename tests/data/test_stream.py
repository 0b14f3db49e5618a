import json
import multiprocessing

import pytest

from swift.data.encode import Options
from swift.data.feed import Feed, Mixture
from swift.data.mix import interleave
from swift.data.rows import Rules
from swift.data.sources import parse_spec
from swift.data.stream import Stream
from swift.errors import DataError
from tests.data.conftest import chat

OPTIONS = Options(
    objective="sft",
    max_length=40,
    truncation_strategy="delete",
    loss_scale="default",
    use_chat_template=True,
    chat_template=None,
    enable_thinking=None,
)


def numbered(count, letter="q"):
    return [chat(f"{letter}{index}", "a") for index in range(count)]


def start(tokenizer, *datasets, want="sft", options=OPTIONS, probabilities=None, stopping_strategy="first_exhausted", **settings):
    feeds = [Feed(parse_spec(name), Rules(want=want), {}) for name in datasets]
    mixture = Mixture(feeds, probabilities=probabilities, stopping_strategy=stopping_strategy, seed=settings.get("seed", 42))
    return Stream(mixture, tokenizer, options, **settings)


def questions(block, tokenizer):
    return [tokenizer.decode(block[index]["input_ids"]).split("\n")[1].removesuffix("<|im_end|>") for index in range(len(block))]


def test_a_pass_over_the_data_holds_every_row_once_in_blocks(tokenizer, write):
    stream = start(tokenizer, write(numbered(25)), block_rows=10, repeats=False)
    blocks = [stream.block(number) for number in range(4)]
    assert [None if block is None else len(block) for block in blocks] == [10, 10, 5, None]
    assert [sorted(questions(block, tokenizer)) for block in blocks[:3]] == [
        sorted(f"q{index}" for index in range(first, min(first + 10, 25))) for first in (0, 10, 20)
    ]
    assert blocks[0].lengths.tolist() == [len(blocks[0][index]["input_ids"]) for index in range(10)]


def test_data_repeats_in_another_order(tokenizer, write):
    stream = start(tokenizer, write(numbered(8)), block_rows=100)
    first, second = (questions(stream.block(number), tokenizer) for number in range(2))
    assert sorted(first) == sorted(second) and first != second
    assert stream.stats()["passes"] == 2


def test_without_shuffling_rows_come_in_order(tokenizer, write):
    stream = start(tokenizer, write(numbered(4)), block_rows=3, shuffle=False)
    assert [questions(stream.block(number), tokenizer) for number in range(3)] == [["q0", "q1", "q2"], ["q3"], ["q0", "q1", "q2"]]


def test_the_order_follows_the_seed(tokenizer, write):
    path = write(numbered(30))
    orders = [questions(start(tokenizer, path, block_rows=30, seed=seed).block(0), tokenizer) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_a_row_group_in_the_middle_of_a_parquet_file_is_a_place(tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"query": [f"q{index}" for index in range(23)], "response": ["a"] * 23})
    pyarrow.parquet.write_table(table, path, row_group_size=4)
    check_resume(tokenizer, [str(path)], block_rows=5)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz"])
def test_a_block_after_seek_is_that_of_an_uninterrupted_run(tokenizer, write, name):
    import gzip

    rows = [{"query": f"q{index} \u96ea", "response": "a"} for index in range(23)]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    if name.endswith("csv"):
        text = "query,response\n" + "".join(f'"{row["query"]}\n","a"\n' for row in rows)
    else:
        text = json.dumps(rows) if name.endswith("json") else lines
    check_resume(tokenizer, [write(gzip.compress(text.encode()) if name.endswith("gz") else text, name)], block_rows=5)


def test_plain_texts_are_resumed_at_a_byte(tokenizer, write):
    path = write("".join(f"text {index}\n" for index in range(23)), "rows.txt")
    options = Options(**{**{name: getattr(OPTIONS, name) for name in OPTIONS.__dataclass_fields__}, "objective": "pt"})
    check_resume(tokenizer, [path], block_rows=5, want="pt", options=options)


@pytest.mark.parametrize("strategy", ["first_exhausted", "all_exhausted"])
def test_a_mixture_is_resumed_in_the_middle(tokenizer, write, strategy):
    paths = [write(numbered(7, "a"), "a.jsonl"), write([*numbered(20, "b"), chat("bad")], "b.jsonl"), write(numbered(9, "c"), "c.jsonl")]
    check_resume(tokenizer, paths, block_rows=5, probabilities=[0.2, 0.5, 0.3], stopping_strategy=strategy, max_rejected=0.5)


def check_resume(tokenizer, datasets, **settings):
    """Blocks, rejected rows, positions and counts of runs that begin at each of 12 blocks equal those of one run."""
    whole = start(tokenizer, *datasets, **settings)
    expected, positions = [], []
    for number in range(12):
        positions.append(json.loads(json.dumps(whole.position(number))))
        block = whole.block(number)
        rows = [block[index]["input_ids"].tolist() for index in range(len(block))]
        expected.append((rows, list(block.rejected), whole.stats()))
    for first in (1, 2, 5, 9):
        resumed = start(tokenizer, *datasets, **settings)
        resumed.seek(first, positions[first])
        for number in range(first, 12):
            assert resumed.position(number) == positions[number]
            block = resumed.block(number)
            rows = [block[index]["input_ids"].tolist() for index in range(len(block))]
            assert (rows, list(block.rejected), resumed.stats()) == expected[number]


def test_a_pass_of_a_mixture_is_that_of_interleave_datasets(tokenizer, write):
    paths = [write(numbered(9, "a"), "a.jsonl"), write(numbered(30, "b"), "b.jsonl")]
    for strategy in ("first_exhausted", "all_exhausted"):
        stream = start(
            tokenizer, *paths, probabilities=[0.3, 0.7], stopping_strategy=strategy, block_rows=1000, shuffle=False, repeats=False
        )
        chosen, rows = interleave([9, 30], [0.3, 0.7], strategy, 42)
        expected = [f"{'ab'[number]}{row}" for number, row in zip(chosen, rows, strict=True)]
        assert questions(stream.block(0), tokenizer) == expected
        assert stream.block(1) is None


def test_of_a_large_set_in_a_mixture_other_rows_come_in_the_next_pass(tokenizer, write):
    paths = [write(numbered(4, "a"), "a.jsonl"), write(numbered(100, "b"), "b.jsonl")]
    stream = start(tokenizer, *paths, probabilities=[0.5, 0.5], block_rows=1000)
    taken = [{name for name in questions(stream.block(number), tokenizer) if name[0] == "b"} for number in range(2)]
    assert taken[0] and taken[1] and not taken[0] & taken[1]


def test_the_last_block_and_the_one_before_can_be_asked_for_again(tokenizer, write):
    stream = start(tokenizer, write(numbered(40)), block_rows=10)
    blocks = [questions(stream.block(number), tokenizer) for number in range(3)]
    assert questions(stream.block(2), tokenizer) == blocks[2]
    assert questions(stream.block(1), tokenizer) == blocks[1]


def test_rejected_rows_come_with_their_block_and_only_the_first_time(tokenizer, write):
    rows = [*numbered(3), chat("no answer"), chat("long", "x" * 99), *numbered(3)]
    path = write(rows)
    stream = start(tokenizer, path, block_rows=4, max_rejected=0.5)
    found = [[item.source for item in stream.block(number).rejected] for number in range(4)]
    assert found == [[f"{path}:4", f"{path}:5"], [], [], []]
    stats = stream.stats()
    assert (stats["rows"], stats["rejected"], stats["examples"], stats["too_long"]) == (8, 2, 12, 2)


def test_too_many_rejected_rows_end_the_run_at_their_block(tokenizer, write):
    stream = start(tokenizer, write([*numbered(20), *[chat("no answer")] * 8, *numbered(20)]), block_rows=10)
    assert [len(stream.block(number)) for number in range(2)] == [10, 10]
    with pytest.raises(DataError, match="8 of 38 rows are rejected, more than 10%"):
        stream.block(2)


def test_data_without_a_usable_row_is_an_error(tokenizer, write):
    with pytest.raises(DataError, match="no row is left to train on"):
        start(tokenizer, write([chat("none")]), max_rejected=1.0).block(0)
    with pytest.raises(DataError, match="no row is left to train on") as caught:
        start(tokenizer, write([chat("q", "x" * 99)]), max_rejected=1.0).block(0)
    assert "more than max_length 40" in caught.value.hint


def test_a_file_that_has_changed_is_not_gone_on_with(tokenizer, write):
    path = write(numbered(20))
    stream = start(tokenizer, path, block_rows=5)
    stream.block(0)
    write(numbered(21))
    with pytest.raises(DataError, match="have changed since the checkpoint"):
        start(tokenizer, path, block_rows=5).seek(1, stream.position(1))


def test_a_sample_is_the_first_rows_of_each_pass(tokenizer, write):
    stream = start(tokenizer, f"{write(numbered(20))}#3", block_rows=5, shuffle=False)
    assert [questions(stream.block(number), tokenizer) for number in range(2)] == [["q0", "q1", "q2"]] * 2


def test_rows_that_are_held_out_never_come(tokenizer, write):
    feed = Feed(parse_spec(write(numbered(8))), Rules(), {})
    held = feed.hold_out(3)
    assert [row.record.messages[0].content for row in held] == ["q0", "q1", "q2"]
    stream = Stream(Mixture([feed]), tokenizer, OPTIONS, block_rows=100, shuffle=False)
    assert [questions(stream.block(number), tokenizer) for number in range(2)] == [[f"q{index}" for index in range(3, 8)]] * 2
    with pytest.raises(DataError, match="leaves nothing to train on"):
        Feed(parse_spec(write(numbered(3))), Rules(), {}).hold_out(3)


def test_only_what_a_block_needs_is_read(tokenizer, write):
    path = write("".join(json.dumps(row) + "\n" for row in numbered(12)) + "not json\n")
    stream = start(tokenizer, path, block_rows=5)
    assert len(stream.block(0)) == 5
    with pytest.raises(DataError, match=r"rows.jsonl:13: not JSON"):
        stream.block(2)


@pytest.mark.multi
def test_blocks_do_not_depend_on_the_number_of_processes(tokenizer, write):
    path = write(numbered(700))
    alone = start(tokenizer, path, block_rows=600)
    with start(tokenizer, path, block_rows=600, num_proc=2) as shared:
        for number in range(3):
            assert questions(shared.block(number), tokenizer) == questions(alone.block(number), tokenizer)
            assert shared.position(number + 1) == alone.position(number + 1)
    assert not multiprocessing.active_children()
