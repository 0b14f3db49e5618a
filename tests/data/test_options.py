"""The options of streaming and interleaving: which go together."""

import pytest

from swift.config.commands import DataInspectConfig, SftConfig
from swift.config.options import build
from swift.errors import ConfigError


def sft(**values):
    return build(SftConfig, ("argument", {"model": "m", "dataset": ["a.jsonl", "b.jsonl"], **values}))


def test_streaming_and_interleaving_take_the_names_of_ms_swift():
    given = {"streaming": "true", "max_steps": "10", "interleave_prob": ["0.7", "0.3"], "stopping_strategy": "all_exhausted"}
    config = sft(**given, streaming_buffer_size="500")
    assert (config.streaming, config.shuffle_buffer_size, config.interleave_prob) == (True, 500, [0.7, 0.3])
    assert sft(interleave_prob="none").interleave_prob is None
    assert sft().shuffle_buffer_size == 1000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"streaming": True}, "--streaming true needs --max_steps"),
        ({"streaming": True, "max_steps": 5, "split_dataset_ratio": 0.1}, "--split_dataset_ratio needs all rows"),
        ({"streaming": True, "max_steps": 5, "val_dataset": ["v"], "streaming_val_size": 3}, "--streaming_val_size has no effect"),
        ({"shuffle_buffer_size": 5}, "--shuffle_buffer_size has no effect"),
        ({"streaming_val_size": 5}, "--streaming_val_size has no effect"),
        ({"stopping_strategy": "all_exhausted"}, "--stopping_strategy has no effect"),
        ({"interleave_prob": [1.0]}, "1 values for 2 data sets"),
        ({"interleave_prob": [0.5, 0.4]}, "sum to 1"),
        ({"interleave_prob": [1.5, -0.5]}, "more than 0"),
        ({"interleave_prob": [1.0], "dataset": ["a.jsonl"]}, "no effect on a single data set"),
    ],
)
def test_options_that_cannot_go_together_are_refused(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        sft(**values)
    assert caught.value.hint


@pytest.mark.parametrize("values", [{"streaming": True}, {"interleave_prob": [0.5, 0.5]}])
def test_how_training_takes_its_rows_is_for_training_alone(values):
    with pytest.raises(ConfigError, match="has no effect here"):
        build(DataInspectConfig, ("argument", {"model": "m", "dataset": ["a.jsonl", "b.jsonl"], **values}))
