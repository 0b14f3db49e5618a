"""A reference notice is right in everything; each kind of damage lowers the metric that is for it."""

import json
from pathlib import Path

import pytest

import swift.data.snow_alerts as snow_alerts
from swift.errors import ConfigError, DataError
from swift.evaluate.judging import Found, Judged, Setting
from swift.evaluate.metrics.notice import NAMES, judge_notice, make, read_facts

FACTS = """English notice, please.
Warning: blizzard, level II (orange)
Area: Feixi County, Hefei
Issued: 18 November 06:57, Hefei Meteorological Observatory
Valid: 12 hours
Snowfall: 14 mm
Snow depth: 20 cm
Wind: force 7
Lowest temperature: -13 °C
Advice: clear snow from roofs and sheds; drive slowly and keep your distance
Hotline: 12345"""
NOTICE = (
    "Orange warning: blizzard in Feixi County, Hefei\n"
    "At 06:57 on 18 November, Hefei Meteorological Observatory issued a level II warning. Over the next 12 hours, expect 14 mm of snow,"
    " lying 20 cm deep, with winds of force 7 and temperatures down to -13 °C.\n"
    "Please clear snow from roofs and sheds, and drive slowly and keep your distance. For help, call 12345."
)
FACTS_ZH = """请用中文。
预警：暴雪橙色（II级）
地区：建邺区
发布：3月12日16:36，南京市气象台
时效：12小时
降雪量：11毫米
积雪：17厘米
风力：9级
最低气温：-17℃
建议：不要急刹车或急转弯
电话：12345"""
NOTICE_ZH = (
    "南京市气象台3月12日16:36发布暴雪橙色预警：建邺区未来12小时降雪量达11毫米，积雪17厘米，风力9级，最低气温-17℃。\n"
    "请不要急刹车或急转弯。求助请打12345。"
)


def metrics(notice, facts=FACTS):
    return judge_notice(notice, read_facts(facts)).metrics


def replaced(old, new):
    assert old in NOTICE
    return NOTICE.replace(old, new)


def replaced_zh(old, new):
    assert old in NOTICE_ZH
    return NOTICE_ZH.replace(old, new)


def rows():
    folder = Path(snow_alerts.__file__).parent
    return [json.loads(line) for name in ("train", "validation") for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def test_every_reference_notice_of_the_data_set_is_right_in_everything():
    found = [metrics(row["messages"][2]["content"], row["messages"][1]["content"]) for row in rows()]
    assert len(found) == 540
    assert {value for one in found for value in one.values()} == {1.0}
    assert {tuple(one) for one in found} == {NAMES}


def test_a_notice_of_another_warning_is_never_right():
    notices = [row["messages"] for row in rows()[480:]]
    found = [metrics(other[2]["content"], own[1]["content"]) for own, other in zip(notices, notices[1:] + notices[:1], strict=True)]
    assert {one["acc"] for one in found} == {0.0}
    assert max(one["facts"] for one in found) < 0.6


@pytest.mark.parametrize(
    ("damaged", "metric"),
    [
        (replaced("Orange", "Red"), "level"),
        (replaced("level II ", "level III "), "level"),
        (replaced("Feixi County", "Shushan District"), "place"),
        (replaced("06:57", "07:57"), "time"),
        (replaced("18 November", "19 November"), "time"),
        (replaced("18 November", "18 December"), "time"),
        (replaced("12 hours", "24 hours"), "time"),
        (replaced("14 mm", "41 mm"), "amounts"),
        (replaced("14 mm", "14 cm"), "amounts"),
        (replaced("14 mm", "20 mm"), "amounts"),
        (replaced("-13 °C", "13 °C"), "amounts"),
        (replaced("force 7", "force 12"), "amounts"),
        (replaced("clear snow from roofs and sheds", "stay calm"), "advice"),
        (replaced("drive slowly", "do not drive slowly"), "advice"),
        (replaced("call 12345", "call 110"), "facts"),
        (replaced("blizzard", "storm"), "facts"),
        (replaced("Hefei Meteorological Observatory", "The office"), "facts"),
        (replaced("For help", "In 2008 it was worse. For help"), "grounded"),
        (replaced("For help", "Lanzhou is safe. For help"), "grounded"),
        (replaced("For help", "紧急情况, for help"), "language"),
        (replaced(" For help, call 12345.", " For help, call 12345"), "form"),
        (NOTICE + "\n" + NOTICE.split("\n")[2], "form"),
        (NOTICE + " The old people of the village say that winters were different when they were young." * 6, "form"),
        (NOTICE + "\nHotline: 12345", "form"),
    ],
)
def test_damage_lowers_its_metric_and_the_notice_is_not_right(damaged, metric):
    found = metrics(damaged)
    assert metrics(NOTICE)[metric] == 1
    assert found[metric] < 1
    assert found["acc"] == 0


@pytest.mark.parametrize(
    ("damaged", "metric"),
    [
        (replaced_zh("橙色", "黄色"), "level"),
        (replaced_zh("建邺区", "浦口区"), "place"),
        (replaced_zh("3月12日", "3月21日"), "time"),
        (replaced_zh("16:36", "16:35"), "time"),
        (replaced_zh("12小时", "6小时"), "time"),
        (replaced_zh("11毫米", "17毫米"), "amounts"),
        (replaced_zh("9级", "6级"), "amounts"),
        (replaced_zh("-17℃", "17℃"), "amounts"),
        (replaced_zh("不要急刹车", "要急刹车"), "advice"),
        (replaced_zh("12345", "12121"), "facts"),
        (replaced_zh("求助", "当前3500人受困。求助"), "grounded"),
        (NOTICE, "language"),
        (replaced_zh("12345。", "12345"), "form"),
    ],
)
def test_damage_to_a_chinese_notice_lowers_its_metric(damaged, metric):
    assert metrics(NOTICE_ZH, FACTS_ZH)["acc"] == 1
    found = metrics(damaged, FACTS_ZH)
    assert found[metric] < 1
    assert found["acc"] == 0


@pytest.mark.parametrize(("facts", "name"), [(FACTS, "Warning"), (FACTS_ZH, "预警")])
@pytest.mark.parametrize("form", ["{}", "- {}", "{}."])
def test_a_copy_of_the_facts_tells_nothing(facts, name, form):
    assert name in facts
    copy = "\n".join(form.format(line) for line in facts.splitlines()[1:])
    found = metrics(copy, facts)
    assert {found[metric] for metric in ("acc", "facts", "level", "place", "time", "amounts", "advice", "grounded", "form")} == {0.0}


def test_fluent_prose_without_the_facts_scores_nothing_for_them():
    found = metrics("Dear residents, winter weather is on its way to our town. Please take care of yourselves. We wish you a safe day.")
    assert {found[metric] for metric in ("acc", "facts", "level", "place", "time", "amounts", "advice", "grounded")} == {0.0}


def test_an_empty_answer_scores_nothing():
    assert set(metrics("").values()) == {0.0}


def test_a_notice_in_other_words_is_right():
    told = (
        "A level II (orange) blizzard warning has been issued by Hefei Meteorological Observatory for Feixi County in Hefei on November 18,"
        " 6:57. Within 12-hour range, 14 millimetres of snow and a depth of 20 cm are likely; winds reach force 7 and the cold minus 13 °C."
        " Keep your distance and drive slowly! Clear roofs and sheds from snow. The number to call is 12345."
    )
    assert metrics(told)["acc"] == 1


def test_what_is_missing_and_what_is_made_up_is_named():
    verdict = judge_notice(replaced("14 mm", "15 mm"), read_facts(FACTS))
    assert verdict.detail["missing"] == ["snowfall"]
    assert verdict.detail["invented"] == ["15", "snowfall 15"]


def test_the_share_of_facts_is_counted_by_hand():
    # level, hazard, place, issuer, date, clock, hotline, hours, snowfall, depth, wind, temperature and two advices: 14 facts
    assert metrics(replaced("14 mm", "15 mm"))["facts"] == pytest.approx(13 / 14)


@pytest.mark.parametrize(
    "text", ["", "What is the capital of France?", FACTS.replace("level II", "level V"), FACTS.replace("Hotline", "Call")]
)
def test_a_text_that_is_no_warning_is_one_clear_line(text):
    with pytest.raises(DataError, match="no facts of a winter warning"):
        read_facts(text)


def test_the_metric_reads_the_field_that_the_declaration_names():
    metric = make(Setting("t", {"facts": "question"}))
    assert metric.judge(Judged(NOTICE, Found(NOTICE, "text"), (NOTICE,), {"question": FACTS})).metrics["acc"] == 1


def test_an_unknown_option_of_the_metric_is_refused():
    with pytest.raises(ConfigError, match="fact"):
        make(Setting("t", {"fact": "question"}))
