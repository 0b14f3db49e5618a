import json

import pytest

from swift import hub
from swift.config.commands import PtConfig, SftConfig
from swift.config.options import build
from swift.errors import ConfigError, DataError
from swift.train.prepare import fill_open_options, prepare_data, stream_rows, training_rows


@pytest.fixture
def prepare(tiny_model, rows):
    """(config, data) of options over the 40 rows."""

    def prepare(cls=SftConfig, **options):
        config = build(cls, ("argument", {"model": str(tiny_model), "dataset": [str(rows)], **options}))
        snapshot = hub.resolve(str(tiny_model))
        fill_open_options(config, snapshot)
        data = prepare_data(config, snapshot)
        fill_open_options(config, snapshot, data)
        return config, data

    return prepare


def test_a_stream_reads_nothing_before_it_is_asked(prepare, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text("not json\n")
    config, data = prepare(dataset=[str(path)], streaming=True, max_steps=5)
    assert data.stream is not None and config.eval_strategy == "no"
    with pytest.raises(DataError, match="not JSON"):
        data.stream.block(0)


def test_the_rows_of_a_stream_are_those_of_a_run_without(prepare):
    _, whole = prepare()
    _, data = prepare(streaming=True, max_steps=5)
    block = data.stream.block(0)
    assert sorted(map(tuple, (block[index]["input_ids"].tolist() for index in range(len(block))))) == sorted(
        tuple(whole.train[index]["input_ids"].tolist()) for index in range(len(whole.train))
    )
    assert data.stream.stats()["tokens"] == whole.train.stats()["tokens"]


def test_the_first_rows_are_held_out(prepare):
    config, data = prepare(streaming=True, max_steps=5, streaming_val_size=3)
    assert [record.messages[0].content for record in data.validation_records] == ["question 0", "question 1", "question 2"]
    assert (len(data.validation), len(data.stream.block(0)), config.eval_strategy) == (3, 37, "steps")


def test_validation_data_of_its_own_is_read_whole(prepare, rows):
    _, data = prepare(streaming=True, max_steps=5, val_dataset=[f"{rows}#7"])
    assert (len(data.validation), len(data.validation_records), len(data.stream.block(0))) == (7, 7, 40)


def test_evaluation_without_validation_data_is_refused(prepare):
    with pytest.raises(ConfigError, match="no validation data"):
        prepare(streaming=True, max_steps=5, eval_strategy="steps")


def test_the_plan_of_a_stream_says_what_is_not_known(prepare):
    config, _ = prepare(streaming=True, max_steps=5, shuffle_buffer_size=2500)
    assert dict(stream_rows(config)) == {
        "training rows": "unknown: read while training, 2,500 at a time",
        "longest row": "at most 2,048 tokens",
        "rejected rows": "counted as they come; the run ends above 10%",
    }


def test_the_plan_tells_all_that_is_cut_or_left_out(prepare, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in (2, 7, 8)))
    _, data = prepare(PtConfig, dataset=[str(path)], max_length=4, truncation_strategy="split")
    plan = dict(training_rows(data))  # 3 + (4 + 4) + (4 + 4 and one that is cut)
    assert plan["training rows"] == "5 (19 tokens, 14 of them trained)"  # the first token of a piece is not predicted
    assert (plan["cut to max_length"], plan["split in pieces"], plan["rejected rows"]) == ("1 rows, 1 tokens", "2 rows", "0")
    _, data = prepare(PtConfig, dataset=[str(path)], max_length=4)
    assert dict(training_rows(data))["rejected rows"] == "2, 2 of them longer than max_length (17 tokens)"
    assert len(data.rejected) == 2


def test_data_sets_are_interleaved(prepare, rows):
    _, data = prepare(dataset=[f"{rows}#5", str(rows)], interleave_prob=[0.5, 0.5], dataset_shuffle=False)
    assert 5 < len(data.train) < 45


def test_the_number_of_processes_is_told_when_it_was_derived(prepare):
    config, _ = prepare()
    assert (config.dataset_num_proc, config.sources["dataset_num_proc"]) == (1, "derived: 40 rows")
