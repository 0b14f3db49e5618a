import os
import threading

import numpy as np
import pytest

from swift.data import encode as encode_module
from swift.data.encode import encode
from swift.data.records import Message, Record
from swift.data.render import render
from swift.errors import ConfigError, DataError
from tests.tiny import make_tokenizer


def record(question="hi", answer="ok", **values):
    return Record([Message("user", question), Message("assistant", answer)], source=f"f:{question}", **values)


RECORDS = [record(f"q{index}", "snow " * (1 + index % 7)) for index in range(600)]


def as_lists(encoded):
    return [
        {name: value.tolist() for name, value in row.items() if value is not None} for row in map(encoded.__getitem__, range(len(encoded)))
    ]


def test_examples_are_what_render_gives(tokenizer):
    encoded = encode(RECORDS[:3], tokenizer, max_length=None)
    expected = [render(one, tokenizer)[0] for one in RECORDS[:3]]
    assert as_lists(encoded) == [{"input_ids": one.input_ids, "labels": one.labels} for one in expected]
    assert encoded.lengths.tolist() == [len(one.input_ids) for one in expected]
    assert encoded[0]["weights"] is None
    with pytest.raises(IndexError):
        encoded[3]


def test_counts_are_told(tokenizer):
    # <|im_start|> user \n h i <|im_end|> \n <|im_start|> assistant \n o k <|im_end|> \n, where words may be several tokens
    length = len(render(record(), tokenizer)[0].input_ids)
    answer = len(tokenizer("ok<|im_end|>")["input_ids"])
    assert encode([record()] * 2, tokenizer, max_length=None).stats() == {
        "examples": 2, "rows": 2, "rejected": 0, "too_long": 0, "tokens_too_long": 0, "truncated": 0, "tokens_cut": 0, "split": 0,
        "trained_tokens": 2 * answer,
        "tokens": 2 * length, "mean_length": float(length), "max_length": length,
    }  # fmt: skip


def test_long_rows_are_rejected_by_default_with_the_reason(tokenizer):
    encoded = encode([record(), record("long", "x" * 99)], tokenizer, max_length=30)
    assert len(encoded) == 1
    [item] = encoded.rejected
    assert item.source == "f:long"
    assert item.reason.endswith("tokens, more than max_length 30")
    assert item.row["messages"][1] == {"role": "assistant", "content": "x" * 99}


def test_truncation_keeps_one_side_and_is_counted(tokenizer):
    row = record("q", "abcdefgh")
    whole = render(row, tokenizer)[0].input_ids
    right = encode([row], tokenizer, max_length=len(whole) - 3, truncation_strategy="right")
    left = encode([row], tokenizer, max_length=len(whole) - 3, truncation_strategy="left")
    assert right[0]["input_ids"].tolist() == whole[:-3]
    assert left[0]["input_ids"].tolist() == whole[3:]
    assert [(one.stats()["truncated"], one.stats()["tokens_cut"]) for one in (right, left)] == [(1, 3), (1, 3)]


def test_a_row_whose_answer_is_cut_away_is_rejected(tokenizer):
    long_question = record("x" * 50)
    encoded = encode([record(), long_question], tokenizer, max_length=20, truncation_strategy="right")
    assert [item.reason.startswith("no trained token is left after cutting") for item in encoded.rejected] == [True]


def test_cutting_the_beginning_keeps_bos():
    bos = make_tokenizer(chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    bos.bos_token = "<|endoftext|>"
    encoded = encode([record("abcdef", "ghij")], bos, max_length=6, truncation_strategy="left")
    assert bos.decode(encoded[0]["input_ids"]) == "<|endoftext|>ghij<|im_end|>"


def test_a_text_is_split_into_pieces_for_pretraining(tokenizer):
    text = Record([Message("assistant", "0123456789")])
    encoded = encode([text], tokenizer, max_length=4, truncation_strategy="split", objective="pt")
    assert [tokenizer.decode(row["input_ids"]) for row in map(encoded.__getitem__, range(3))] == ["0123", "4567", "89<|im_end|>"]
    assert encoded.record_indices.tolist() == [0, 0, 0]
    with pytest.raises(ConfigError, match="split is for pre-training"):
        encode([record()], tokenizer, max_length=4, truncation_strategy="split")


def test_all_that_is_cut_or_left_out_is_counted(tokenizer):
    texts = [Record([Message("assistant", "x" * length)], source=f"f:{length}") for length in (2, 7, 8, 11, 3)]
    lengths = [len(render(text, tokenizer, objective="pt")[0].input_ids) for text in texts]
    assert lengths == [3, 8, 9, 12, 4]  # one token a letter and the end

    def counts(strategy):
        stats = encode(texts, tokenizer, max_length=4, truncation_strategy=strategy, objective="pt").stats()
        return {
            name: stats[name]
            for name in ("examples", "rows", "rejected", "too_long", "tokens_too_long", "truncated", "tokens_cut", "split")
        }

    assert counts("delete") == {
        "examples": 2, "rows": 2, "rejected": 3, "too_long": 3, "tokens_too_long": 8 + 9 + 12, "truncated": 0, "tokens_cut": 0, "split": 0,
    }  # fmt: skip
    assert counts("right") == counts("left") == {
        "examples": 5, "rows": 5, "rejected": 0, "too_long": 0, "tokens_too_long": 0, "truncated": 3, "tokens_cut": 4 + 5 + 8, "split": 0,
    }  # fmt: skip
    # 8 = 4 + 4; 9 = 4 + 4 and one token that predicts nothing; 12 = 4 + 4 + 4.
    assert counts("split") == {
        "examples": 9, "rows": 5, "rejected": 0, "too_long": 0, "tokens_too_long": 0, "truncated": 1, "tokens_cut": 1, "split": 3,
    }  # fmt: skip


def test_weights_and_labels_that_come_late_are_filled_in_before(tokenizer, tmp_path):
    rows = [record(f"q{index}") for index in range(300)] + [record("last", label=1)]
    rows[280].messages[1].loss_scale = 2.0
    for cache_dir in (None, tmp_path):
        encoded = encode(rows, tokenizer, max_length=None, cache_dir=cache_dir)
        assert {*encoded[0]["weights"].tolist(), *encoded[300]["weights"].tolist()} == {1.0}
        assert {*encoded[280]["weights"].tolist()} == {0.0, 2.0}
        assert [encoded[index].get("label") for index in (0, 299, 300)] == [None, None, 1]


def test_records_on_disk_and_in_a_list_are_the_same_input(tokenizer, tmp_path):
    from swift.data.spool import Blobs, Records, pack

    blobs = Blobs()
    for one in RECORDS[:300]:
        blobs.append(pack(one))
    listed = encode(RECORDS[:300], tokenizer, max_length=64, cache_dir=tmp_path)
    spooled = encode(Records(blobs), tokenizer, max_length=64, cache_dir=tmp_path)
    assert listed.path == spooled.path
    assert as_lists(encode(Records(blobs), tokenizer, max_length=64)) == as_lists(listed)


def test_without_a_cache_large_data_goes_to_files_and_is_the_same(tokenizer, monkeypatch):
    from swift.data import spool

    inside = encode(RECORDS, tokenizer, max_length=20)
    monkeypatch.setattr(spool, "IN_MEMORY_BYTES", 1000)
    outside = encode(RECORDS, tokenizer, max_length=20)
    assert as_lists(inside) == as_lists(outside)
    assert inside.rejected == outside.rejected and len(inside.rejected) > 0


def test_weights_are_kept_only_when_some_row_has_them(tokenizer):
    weighted = Record([Message("user", "q"), Message("assistant", "a", loss_scale=3.0)])
    encoded = encode([record(), weighted], tokenizer, max_length=None)
    assert {*encoded[0]["weights"].tolist()} == {1.0}
    assert {*encoded[1]["weights"].tolist()} == {0.0, 3.0}
    assert encoded[1]["weights"].dtype == np.float32


def test_pairs_are_one_example_with_two_sides(tokenizer, tmp_path):
    pair = record("q", "good", rejected=[Message("user", "q"), Message("assistant", "bad")], margin=0.5)
    for cache_dir in (None, tmp_path):
        encoded = encode([pair, pair], tokenizer, max_length=None, objective="preference", cache_dir=cache_dir)
        assert (len(encoded), encoded[1]["margin"]) == (2, 0.5)
        texts = [tokenizer.decode(encoded[1][side]["input_ids"]) for side in ("chosen", "rejected")]
        assert [text.split("assistant\n")[1] for text in texts] == ["good<|im_end|>\n", "bad<|im_end|>\n"]
        assert encoded.lengths[1] == sum(len(encoded[1][side]["labels"]) for side in ("chosen", "rejected"))


def test_a_pair_is_rejected_if_one_side_is_too_long(tokenizer):
    pair = record("q", "good", rejected=[Message("user", "q"), Message("assistant", "x" * 99)])
    encoded = encode(
        [record(rejected=[Message("user", "hi"), Message("assistant", "no")]), pair], tokenizer, max_length=30, objective="preference"
    )
    assert (len(encoded), len(encoded.rejected), len(encoded[0])) == (1, 1, 2)


def test_labels_of_rows_come_along(tokenizer):
    encoded = encode([record(label=True, channel="x"), record(label=False)], tokenizer, max_length=None)
    assert [(row["label"], row.get("channel")) for row in (encoded[0], encoded[1])] == [(True, "x"), (False, None)]


def test_nothing_left_is_an_error(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no row is left") as caught:
        encode([record()], tokenizer, max_length=5, cache_dir=tmp_path)
    assert "more than max_length 5 (f:hi)" in caught.value.hint
    assert os.listdir(tmp_path) == []


def test_the_second_call_tokenizes_nothing(tokenizer, tmp_path, monkeypatch):
    first = encode(RECORDS[:20], tokenizer, max_length=64, cache_dir=tmp_path)
    monkeypatch.setattr(encode_module, "encode_chunk", None)
    second = encode(RECORDS[:20], tokenizer, max_length=64, cache_dir=tmp_path)
    assert as_lists(first) == as_lists(second)
    assert first.stats() == second.stats()
    assert isinstance(second[0]["input_ids"], np.memmap)


def test_rejected_rows_come_back_from_the_cache(tokenizer, tmp_path):
    rows = [record(), record("long", "x" * 99)]
    first, second = (encode(rows, tokenizer, max_length=30, cache_dir=tmp_path) for _ in range(2))
    assert first.rejected == second.rejected


def test_every_input_has_its_own_place_in_the_cache(tokenizer, tmp_path):
    other = make_tokenizer(chat_template=tokenizer.chat_template.replace("\\n", "\\t"))
    bigger = make_tokenizer(vocab_size=330)
    inputs = [
        ([record()], tokenizer, {}),
        ([record("other")], tokenizer, {}),
        ([record()], tokenizer, {"max_length": 99}),
        ([record()], tokenizer, {"loss_scale": "all"}),
        ([record()], tokenizer, {"chat_template": "chatml"}),
        ([record()], other, {}),
        ([record()], bigger, {}),
    ]
    paths = {encode(rows, one, **{"max_length": None, "cache_dir": tmp_path, **options}).path for rows, one, options in inputs}
    assert len(paths) == len(os.listdir(tmp_path)) == len(inputs)


def test_an_interrupted_write_leaves_nothing_that_looks_finished(tokenizer, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(KeyboardInterrupt):
            encode([record()], tokenizer, max_length=None, cache_dir=tmp_path)
    assert os.listdir(tmp_path) == []
    assert len(encode([record()], tokenizer, max_length=None, cache_dir=tmp_path)) == 1


def test_writers_at_the_same_time_agree(tokenizer, tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(encode(RECORDS, tokenizer, max_length=64, cache_dir=tmp_path))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.path for one in found}) == len(os.listdir(tmp_path)) == 1
    assert all(as_lists(one) == as_lists(found[0]) for one in found)


@pytest.mark.slow
def test_processes_give_the_same_result(tokenizer, monkeypatch):
    monkeypatch.setattr(encode_module, "ROWS_A_PROCESS", 100)
    alone, shared = (encode(RECORDS, tokenizer, max_length=20, num_proc=num_proc) for num_proc in (1, 4))
    assert as_lists(alone) == as_lists(shared)
    assert alone.rejected == shared.rejected


@pytest.mark.parametrize("options", [{"objective": "x"}, {"truncation_strategy": "middle"}, {"max_length": 1}])
def test_options_that_mean_nothing_are_refused(tokenizer, options):
    with pytest.raises(ConfigError):
        encode([record()], tokenizer, **{"max_length": None, **options})
