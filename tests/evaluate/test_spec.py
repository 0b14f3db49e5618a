"""Declarations of tasks: found by name, refused with one clear line."""

from pathlib import Path

import pytest

from swift.errors import ConfigError
from swift.evaluate.spec import find_task, load_task, task_names, task_table
from tests.evaluate.rows import write

MINIMAL = """
name: mine
title: Mine
licence: MIT
split: test
source: {layouts: [{splits: {test: ["*.jsonl"]}}]}
modes:
  letter: {prompt: "{{ q }}", choices: [A, B], gold: a}
"""


@pytest.mark.parametrize("name", task_names())
def test_every_declaration_is_whole(name: str) -> None:
    spec = find_task(name)
    assert spec.name == name
    assert spec.licence and spec.title and spec.modes


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("ceval-exam", "ceval"),
        ("C-Eval", "ceval"),
        ("hella_swag", "hellaswag"),
        ("ARC-C", "arc_challenge"),
        ("truthful_qa", "truthfulqa_mc1"),
    ],
)
def test_a_task_is_found_by_the_names_that_others_give_it(given: str, meant: str) -> None:
    assert find_task(given).name == meant


def test_subjects_and_groups_are_as_many_as_published() -> None:
    """MMLU: 57 (arXiv:2009.03300); C-Eval: 52 = 20 + 10 + 11 + 11 (arXiv:2305.08322, table 1); CMMLU: 67 (arXiv:2306.09212)."""
    assert {group: len(names) for group, names in find_task("mmlu").groups.items()} == {
        "STEM": 18, "Humanities": 13, "Social Sciences": 12, "Other": 14,
    }  # fmt: skip
    assert {group: len(names) for group, names in find_task("ceval").groups.items()} == {
        "STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11,
    }  # fmt: skip
    assert len(find_task("cmmlu").category_names) == 67
    assert find_task("ceval").category_names["law"] == "法学"


def test_an_unknown_task_is_refused_with_a_near_one() -> None:
    with pytest.raises(ConfigError, match="unknown task 'helaswag'") as caught:
        find_task("helaswag")
    assert caught.value.hint == "did you mean 'hellaswag'?"


def test_a_task_of_the_user_is_a_yaml_file(tmp_path: Path) -> None:
    spec = find_task(str(write(tmp_path / "mine.yaml", MINIMAL)))
    assert list(spec.modes) == ["letter"]


def test_a_file_of_the_user_that_was_changed_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", MINIMAL)
    assert find_task(str(path)).title == "Mine"
    write(path, MINIMAL.replace("Mine", "Ours"))
    assert find_task(str(path)).title == "Ours"


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("title:", "titel:", "unknown field 'titel'", "did you mean 'title'?"),
        ("prompt:", "promt:", "unknown field 'promt' in modes.letter", "did you mean 'prompt'?"),
        ("splits:", "split:", "unknown field 'split' in source.layouts", "did you mean 'splits'?"),
        ("  letter:", "  leter:", "unknown field 'leter' in modes", "did you mean 'letter'?"),
        ("split: test", "split: tset", "split is 'tset', which no layout has", "did you mean 'test'?"),
        ("licence: MIT\n", "", "missing required field `licence`", None),
        ("gold: a", "gold: [1]", "Expected `str`", None),
        ("modes:", "modes: [", "is not YAML", None),
        ("name: mine", "name: ../mine", "name is '../mine'", None),
        ("gold: a", "gold: a, metrics: []", "modes.letter has no metrics", None),
    ],
)
def test_a_wrong_declaration_is_refused_in_one_line(tmp_path: Path, old: str, new: str, message: str, hint: str | None) -> None:
    path = write(tmp_path / "mine.yaml", MINIMAL.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_task(path)
    assert message in caught.value.message and str(path) in caught.value.message and "\n" not in caught.value.message
    if hint is not None:
        assert caught.value.hint == hint


def test_a_declaration_that_is_not_utf_8_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_task(write(tmp_path / "latin.yaml", MINIMAL.replace("Mine", "Übung"), encoding="latin-1"))
    with pytest.raises(ConfigError, match="No such file"):
        find_task(str(tmp_path / "none.yaml"))


def test_solved_examples_need_a_split(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", MINIMAL + "shots: {count: 2}\n")
    with pytest.raises(ConfigError, match=r"shots.count is 2, but there is no shots.split"):
        load_task(path)


def test_the_list_of_tasks_has_a_row_a_task() -> None:
    heads, rows = task_table()
    assert [row[0] for row in rows] == task_names()
    assert {len(row) for row in rows} == {len(heads)}
