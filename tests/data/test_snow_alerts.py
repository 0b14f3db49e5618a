import json
import re

import pytest

from swift.data.load import load_records
from swift.data.snow_alerts import generate
from swift.data.sources import BUILT_IN

FOLDER = BUILT_IN["snow-alerts"]


def rows(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def numbers(text):
    """Every number with its sign; 07 and 7 are one number."""
    return {float(found) for found in re.findall(r"(?<!\d)-?\d+(?:\.\d+)?", text)}


def facts(row):
    """The facts without what is only wording: the first line, the time, the advice and the hotline."""
    wording = ("Issued", "Advice", "Hotline", "\u53d1\u5e03", "\u5efa\u8bae", "\u7535\u8bdd")
    lines = row["messages"][1]["content"].split("\n")[1:]
    return tuple(line for line in lines if not line.startswith(wording))


def test_generating_again_gives_the_shipped_bytes(tmp_path):
    generate.write(tmp_path)
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_another_seed_gives_other_rows():
    assert generate.rows(1) == generate.rows(1) != generate.rows(2)


def test_there_are_480_and_60_rows_and_all_of_them_can_be_trained_on():
    loaded = load_records(["snow-alerts"], val_datasets=["swift::snow-alerts:validation"], strict=True)
    assert (len(loaded.train), len(loaded.validation)) == (480, 60)


@pytest.mark.parametrize("name", ["train", "validation"])
def test_every_number_of_a_notice_is_in_its_facts(name):
    for row in rows(name):
        _, ask, notice = (message["content"] for message in row["messages"])
        assert numbers(notice) and numbers(notice) <= numbers(ask), notice


def test_a_notice_names_the_place_and_the_hotline_of_its_facts():
    for row in rows("train"):
        ask, notice = row["messages"][1]["content"], row["messages"][2]["content"]
        values = dict(re.split(r": |\uff1a", line, maxsplit=1) for line in ask.split("\n")[1:])
        for name in ("Area", "Hotline", "\u5730\u533a", "\u7535\u8bdd"):
            assert values.get(name, "") in notice


def test_no_warning_is_there_twice_or_in_both_sets():
    train, validation = [facts(row) for row in rows("train")], [facts(row) for row in rows("validation")]
    assert len({*train, *validation}) == len(train) + len(validation) == 540


def test_both_languages_and_all_levels_and_kinds_are_there():
    texts = [row["messages"][1]["content"] for row in rows("train")]
    for word in ("red", "orange", "yellow", "blue", "heavy snow", "blizzard", "road icing", "freezing"):
        assert sum(word in text for text in texts) >= 10, word
    colours = "\u7ea2\u8272 \u6a59\u8272 \u9ec4\u8272 \u84dd\u8272"
    kinds = "\u5927\u96ea \u66b4\u96ea \u9053\u8def\u7ed3\u51b0 \u4f4e\u6e29\u51b0\u51bb"
    for word in f"{colours} {kinds}".split():
        assert sum(word in text for text in texts) >= 10, word


def test_a_notice_is_in_the_language_that_was_asked_for():
    for row in rows("train"):
        ask, notice = row["messages"][1]["content"], row["messages"][2]["content"]
        assert ("English" in ask.split("\n")[0]) == (re.search("[\u4e00-\u9fff]", notice) is None)


def test_levels_follow_the_published_amounts_of_snow():
    least = {"red": 15, "orange": 10, "yellow": 6, "blue": 4}
    for row in rows("train"):
        found = re.search(r"level \w+ \((\w+)\).*Snowfall: (\d+) mm", row["messages"][1]["content"], re.DOTALL)
        if found:
            assert int(found[2]) >= least[found[1]]
