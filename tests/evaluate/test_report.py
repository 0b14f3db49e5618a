"""The report: what it says, in all its forms, and that nothing a model wrote can break it."""

import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from swift.errors import DataError
from swift.evaluate import report
from swift.evaluate.base import About, ModelResult, Outcome, TaskResult
from swift.evaluate.contamination import Contamination, Match, TaskContamination
from swift.evaluate.report import build, html, markdown
from swift.evaluate.results import TaskFile, file_of

ABOUT = About(
    "mmlu",
    "Massive multitask language understanding",
    "letter",
    "acc",
    5,
    False,
    "MIT",
    "hf::cais/mmlu",
    "d" * 64,
    {"law": "Humanities", "history": "Humanities", "physics": "STEM"},
    {"no majority": 3},
)
EVIL = '<script>alert("x")</script> | `a` **b** </pre>\n![i](http://evil.example/i.png) {{ 7 * 7 }}'


def outcome(number, right, *, category="law", prediction=None, **more):
    gold = "ABCD"[number % 4]
    wrong = "ABCD"[(number + 1) % 4]
    detail = {"choices": list("ABCD"), "logprobs": [-0.5 if letter == (gold if right else wrong) else -2.0 for letter in "ABCD"]}
    values = {"prompt": "Question?", "gold": gold, "prediction": prediction or (gold if right else wrong)} | more
    return Outcome(f"q{number}", category, metrics={"acc": float(right)}, detail=detail, **values)


def model(name, rights, *, about=ABOUT, categories=("law", "history", "physics")):
    outcomes = [outcome(number, right, category=categories[number % len(categories)]) for number, right in enumerate(rights)]
    facts = {"name": name, "slug": name, "digest": name.encode().hex() * 8, "dtype": "float32", "infer_backend": "native"}
    return ModelResult(name, [TaskResult(about, outcomes, {"seconds": 12.5, "tokens_computed": 900, "tokens_shared": 4100})], facts)


BASE = model("base", [number % 3 == 0 for number in range(60)])
TUNED = model("tuned", [number % 3 != 2 for number in range(60)])


def written(folder, *models):
    for one in models:
        for task in one.tasks:
            file = TaskFile(file_of(folder, one.facts, task.about), task.about, one.facts)
            with file.appending():
                for item in task.outcomes:
                    file.add(item)
    return report.write(folder, list(models))


class Page(HTMLParser):
    """Tags that are open, all tags, and text; fails where tags do not match."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_results_stand_in_the_order_of_the_command_line():
    made = build([TUNED, BASE])
    assert [one.name for one in made.models] == ["tuned", "base"]
    assert [one.model for one in made.tasks[0].results] == ["tuned", "base"]
    assert [(one.first, one.second) for one in made.comparisons] == [("tuned", "base")]


def test_a_result_says_what_led_to_it():
    found = build([BASE]).tasks[0].results[0]
    # Every third item is right, and every third is of law: all of law, nothing else.
    assert (found.value.value, found.macro.value) == (pytest.approx(20 / 60), pytest.approx(1 / 3))
    assert [(one.name, one.group, one.value.value, one.value.count) for one in found.categories] == [
        ("law", "Humanities", 1.0, 20),
        ("history", "Humanities", 0.0, 20),
        ("physics", "STEM", 0.0, 20),
    ]
    assert [(one.name, one.categories, one.value.value) for one in found.groups] == [("Humanities", 2, 0.5), ("STEM", 1, 0.0)]
    assert (found.guess.blind, found.guess.constant) == (0.25, 0.25)
    assert found.file == f"items/base-{BASE.facts['digest'][:8]}/mmlu-letter-dddddddd.jsonl"


def test_calibration_compares_probabilities_with_what_is_right():
    found = build([BASE]).tasks[0].results[0].calibration
    # exp(-0.5) / (exp(-0.5) + 3 exp(-2)) = 0.5991 for each item, of which a third is right.
    share = math.exp(-0.5) / (math.exp(-0.5) + 3 * math.exp(-2))
    rest = (1 - share) / 3
    assert [(one.count, one.confidence, one.accuracy) for one in found.bins] == [(60, pytest.approx(share), pytest.approx(1 / 3))]
    assert found.error == pytest.approx(share - 1 / 3)
    right, wrong = (1 - share) ** 2 + 3 * rest**2, share**2 + (1 - rest) ** 2 + 2 * rest**2
    assert found.brier == pytest.approx(right / 3 + wrong * 2 / 3)


@pytest.mark.parametrize(
    ("outcomes", "told"),
    [
        ([outcome(n, n % 4 == 0) for n in range(40)], "not told apart from blind guessing, which gets 25.0%"),
        ([outcome(n, False) for n in range(40)], "below blind guessing, which gets 25.0%"),
        ([outcome(n, n % 2 == 0) for n in range(20)], "only 20 items: the interval reaches 20 points to either side"),
        ([outcome(n, n % 4 == 1, prediction="B") for n in range(40)], "100% of the answers are 'B'"),
        (
            [outcome(n, n % 20 < 17, gold="A" if n % 10 else "B", prediction="A") for n in range(40)],
            "not told apart from always answering 'A', which gets 90.0%",
        ),
        (
            [replace(outcome(n, n % 2 == 0), prediction=None) for n in range(40)],
            "answers that could not be read, and count as wrong: 40 (100%)",
        ),
        (
            [replace(outcome(n, 1), detail={"notes": {"truncated": 3 * (n % 2)}}) for n in range(40)],
            "prompts cut, so that they fit the model: 20",
        ),
        (
            [replace(outcome(n, 1), detail={"finish_reason": "length" if n % 2 else "stop"}) for n in range(40)],
            "answers cut off at the most tokens that they may have: 20 (50%)",
        ),
        (
            [replace(outcome(n, 1), metrics={"acc": math.nan if n == 1 else 1.0}) for n in range(40)],
            "items without a finite value of acc, left out of its mean: 1",
        ),
    ],
)
def test_a_result_that_says_little_says_so(outcomes, told):
    found = build([ModelResult("m", [TaskResult(ABOUT, outcomes)])]).tasks[0].results[0]
    assert told in "\n".join(found.warnings)


def test_few_items_say_nothing_about_a_constant_answer():
    found = build([ModelResult("m", [TaskResult(ABOUT, [outcome(n, 1, gold="ABBB"[n % 4]) for n in range(8)])])]).tasks[0].results[0]
    assert (found.guess.blind, found.guess.constant, found.guess.best) == (0.25, 0.25, 0.25)


def test_written_answers_of_few_kinds_have_a_guess_too():
    outcomes = [replace(outcome(n, 1), detail={"answer": "..."}) for n in range(40)]
    found = build([ModelResult("m", [TaskResult(replace(ABOUT, mode="generate"), outcomes)])]).tasks[0].results[0]
    assert (found.guess.blind, found.guess.constant) == (0.25, 0.25)
    other = [replace(item, gold=str(n)) for n, item in enumerate(outcomes)]
    assert build([ModelResult("m", [TaskResult(ABOUT, other)])]).tasks[0].results[0].guess is None


def test_a_result_that_stands_has_no_warning():
    many = ModelResult("m", [TaskResult(ABOUT, [outcome(n, n % 3 != 0) for n in range(300)])])
    assert build([many]).tasks[0].results[0].warnings == []


def test_all_forms_show_results_comparisons_and_settings(tmp_path):
    report.write(tmp_path, [BASE, TUNED])
    page = " ".join("".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).text).split())
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    value = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    for shown in ("33.3 %", "66.7 %", "hf::cais/mmlu", "MIT", "3 no majority", "dddddddddddd", "float32", "+33.3", "better", "physics"):
        assert shown in page
        assert shown in text.replace("\\", "")
    assert "McNemar 20 0 20 20 60" in page
    assert value["version"] == 1
    assert value["comparisons"][0]["counts"] == {"both": 20, "only_first": 0, "only_second": 20, "neither": 20}
    assert value["tasks"][0]["results"][1]["facts"] == {"seconds": 12.5, "tokens_computed": 900, "tokens_shared": 4100}


def test_the_page_needs_no_network_and_no_script(tmp_path):
    report.write(tmp_path, [BASE, TUNED])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    addresses = [value for _, name, value in page.attributes if name in ("href", "src")]
    assert addresses
    assert [value for value in addresses if not value.startswith(("#", "items/"))] == []
    assert "url(" not in "".join(page.text)


def test_tables_have_captions_and_scopes_and_plots_have_names(tmp_path):
    report.write(tmp_path, [BASE, TUNED])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("caption") == page.tags.count("table") > 4
    assert page.tags.count("th") == sum(tag == "th" and name == "scope" for tag, name, _ in page.attributes)
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert "base: 33.3 % (22.7 to 45.9)" in labels


def test_what_models_write_is_shown_and_never_obeyed(tmp_path):
    about = replace(ABOUT, name=EVIL, title=EVIL, licence=EVIL, source=EVIL, counts={EVIL: 2}, groups={EVIL: EVIL})
    outcomes = [
        Outcome(f"{EVIL}{n}", EVIL, EVIL, EVIL, EVIL, {"acc": 1.0, EVIL: 0.5}, {"answer": EVIL, "notes": {EVIL: 1}}) for n in range(3)
    ]
    wrong = [replace(item, metrics={"acc": 0.0, EVIL: 0.5}) for item in outcomes]
    models = [ModelResult(EVIL, [TaskResult(about, outcomes, {EVIL: 1.0})], {EVIL: EVIL}), ModelResult("b", [TaskResult(about, wrong)])]
    dirty = Contamination([EVIL], 1, 13, [TaskContamination(EVIL, 3, 0, [Match(f"{EVIL}0", 1.0, True, EVIL)])])
    report.write(tmp_path, models, contamination=dirty)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "img"} & set(page.tags)
    assert "{{ 7 * 7 }}" in "".join(page.text)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside and "![i]" not in outside and "**b**" not in outside
    shown = Page(MarkdownIt("commonmark").enable("table").render(text))
    assert not {"script", "img", "strong"} & set(shown.tags)


def test_a_fence_is_longer_than_what_it_holds():
    assert markdown.code("a\n````\nb") == "`````text\na\n````\nb\n`````"


def test_chinese_stays_as_it_is(tmp_path):
    name = "调优后的模型"
    one = ModelResult(name, [TaskResult(replace(ABOUT, title="中文理解"), [outcome(n, n % 2, category="法律") for n in range(4)])])
    report.write(tmp_path, [one])
    for ending in ("html", "md", "json"):
        text = (tmp_path / f"report.{ending}").read_text(encoding="utf-8")
        assert name in text and "法律" in text and "中文理解" in text


def test_contaminated_examples_are_named_and_left_out():
    dirty = Contamination(
        ["train.jsonl"], 10, 13, [TaskContamination("mmlu", 60, 1, [Match("q0", 0.5, False, "train.jsonl:4"), Match("q1", 1.0, True, "r")])]
    )
    made = build([BASE, TUNED], contamination=dirty)
    effect = made.effects[0]
    assert (effect.model, effect.count) == ("base", 2)
    assert (effect.clean.value, effect.contaminated.value) == (pytest.approx(19 / 58), 0.5)
    assert "examples in the training data: 2" in made.tasks[0].results[0].warnings
    page = html.render(made)
    assert "train.jsonl:4" in page
    assert "32.8 %" in page


def test_perplexity_is_written_as_a_number_and_lower_is_better():
    about = replace(ABOUT, mode="perplexity", metric="perplexity", groups={})
    sides = [
        ModelResult(
            name,
            [TaskResult(about, [Outcome(str(n), "", "text", "", None, {"nll": nats * (n + 5), "tokens": n + 5.0}) for n in range(40)])],
        )
        for name, nats in (("base", 3.0), ("tuned", 2.0))
    ]
    made = build(sides)
    assert made.tasks[0].results[0].unanswered == 0
    text = markdown.render(made)
    assert "20.09" in text and "7.389" in text and "-12.7" in text
    assert "| better |" in text


def test_a_broken_model_still_has_a_report(tmp_path):
    about = replace(ABOUT, mode="perplexity", metric="perplexity", groups={})
    outcomes = [Outcome(str(n), "", "half \ud83d", "", None, {"nll": 9000.0 + n, "tokens": 9.0}) for n in range(3)]
    report.write(tmp_path, [ModelResult("m", [TaskResult(about, outcomes)])])
    value = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert value["tasks"][0]["results"][0]["value"]["value"] is None
    assert "inf" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_fields_of_the_json_are_those_of_its_version(tmp_path):
    report.write(tmp_path, [BASE, TUNED])
    value = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    fields = "version created swift options models tasks comparisons uncompared contamination effects flips"
    assert set(value) == set(fields.split())
    fields = "model about items value macro metrics groups categories unanswered notes guess calibration facts warnings file"
    assert set(value["tasks"][0]["results"][0]) == set(fields.split())
    assert set(value["tasks"][0]["results"][0]["value"]) == set("value low high count clusters method".split())
    fields = "task mode metric first second count alone_first alone_second value_first value_second difference low high"
    assert set(value["comparisons"][0]) == {*fields.split(), "p_value", "p_adjusted", "method", "counts"}


def test_an_earlier_report_is_read_back_with_all_its_answers(tmp_path):
    place = written(tmp_path, BASE, TUNED)
    found = report.load(place)
    assert [asdict(one) for one in found] == [asdict(BASE), asdict(TUNED)]
    made = build([TUNED], found)
    assert [one.name for one in made.models] == ["tuned", "base (earlier)", "tuned (earlier)"]
    assert [(one.first, one.second, one.difference) for one in made.comparisons] == [
        ("base (earlier)", "tuned", pytest.approx(20 / 60)),
        ("tuned (earlier)", "tuned", 0.0),
    ]


def test_a_folder_without_a_report_is_no_baseline(tmp_path):
    with pytest.raises(DataError, match="holds no report of swift eval"):
        report.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": "1"}'])
def test_another_json_file_is_no_report(tmp_path, text):
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="is no report of swift eval"):
        report.load(tmp_path)


def test_a_report_with_parts_missing_is_told(tmp_path):
    (tmp_path / "report.json").write_text('{"version": 1, "models": []}', encoding="utf-8")
    with pytest.raises(DataError, match="lacks parts of a report"):
        report.load(tmp_path)


def test_a_report_of_a_newer_swift_is_refused(tmp_path):
    (tmp_path / "report.json").write_text('{"version": 2, "swift": "9.0"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"written by a newer swift \(9.0\)"):
        report.load(tmp_path)


def test_a_baseline_without_its_answers_is_told(tmp_path):
    place = written(tmp_path, BASE)
    file_of(place, BASE.facts, ABOUT).unlink()
    with pytest.raises(DataError, match="is missing: the answers of base on mmlu"):
        report.load(place)


def test_a_baseline_that_lost_answers_is_told(tmp_path):
    place = written(tmp_path, BASE)
    path = file_of(place, BASE.facts, ABOUT)
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:11]), encoding="utf-8")
    with pytest.raises(DataError, match="holds 10 answers, the report 60"):
        report.load(place)


def numbers_alone(name, value):
    about = replace(ABOUT, name="MMStar", title="MMStar", mode="VLMEvalKit 0.0.20", metric="Overall", groups={}, counts={})
    return ModelResult(name, [TaskResult(about, [], {"Overall": value, "infer_failed": 1.0})])


def test_a_number_without_items_is_shown_as_it_is(tmp_path, capsys):
    models = [numbers_alone("a", 25.5), numbers_alone("b", 31.25)]
    report.write(tmp_path, models)
    report.show(models)
    seen = capsys.readouterr()
    assert "25.5" in seen.out and "31.25" in seen.out
    assert "the number is that of VLMEvalKit 0.0.20 as it stands" in re.sub(r"\s+", " ", seen.err)
    page = " ".join("".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).text).split())
    assert "31.25" in page
    with pytest.raises(DataError, match=r"holds results of VLMEvalKit 0\.0\.20, whose answers are in files of its own"):
        report.load(tmp_path)


def test_a_share_is_one_though_it_could_not_be_computed_of_an_item():
    one = replace(outcome(0, 1), metrics={"acc": math.nan})
    made = build([ModelResult("m", [TaskResult(ABOUT, [one, outcome(1, 1)])])])
    assert made.tasks[0].shares == ["acc"]


def test_the_terminal_shows_results_and_comparisons(capsys):
    other = replace(ABOUT, digest="e" * 64, num_fewshot=0)
    report.show([BASE, TUNED, model("third", [True] * 60, about=other)])
    seen = capsys.readouterr()
    out = re.sub(r"\s+", " ", seen.out)
    assert "mmlu (letter)" in out and "66.7 %" in out and "+33.3" in out
    assert "third is not compared with base" in seen.err
    assert "num_fewshot 5 and 0" in seen.err
