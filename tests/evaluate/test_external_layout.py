"""What authors publish, written anew as a hub has it, for packages that read that alone."""

import json
from pathlib import Path

import pytest
import yaml

from swift.config.evaluate import EvalConfig
from swift.config.options import build
from swift.errors import ConfigError, DataError
from swift.evaluate.external.layout import laid_out, subsets_of

MMLU = {
    "dev/astronomy_dev.csv": "Which planet is largest?,Mars,Jupiter,Venus,Earth,B\n",
    "test/astronomy_test.csv": '"How far, roughly?",1,2,3,4,D\nIs it bright?,yes,no,maybe,never,A\n',
    "dev/anatomy_dev.csv": "What beats?,heart,lung,skin,bone,A\n",
    "test/anatomy_test.csv": "What breathes?,heart,lung,skin,bone,B\n",
}
CEVAL = {
    "dev/law_dev.csv": "id,question,A,B,C,D,answer,explanation\n0,法律是什么？,一,二,三,四,C,因为如此\n",
    "val/law_val.csv": "id,question,A,B,C,D,answer\n0,谁制定？,一,二,三,四,A\n",
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def make(tmp_path, task, place, **options):
    values = {"models": ["x"], "eval_backend": "evalscope", "eval_dataset": [task], "eval_output_dir": str(tmp_path / "out")}
    return build(EvalConfig, ("flag", {**values, "eval_dataset_args": {task: {"local_path": str(place)}}, **options}))


def rows(folder, name):
    return [json.loads(line) for line in (Path(folder) / name).read_text(encoding="utf-8").splitlines()]


def test_subjects_become_one_subset_where_the_package_wants_one(tmp_path):
    place = write(tmp_path / "mmlu", MMLU)
    found = laid_out(make(tmp_path, "mmlu", place), "evalscope", "mmlu")
    assert found["subset_list"] == ["anatomy", "astronomy"]
    head = yaml.safe_load((Path(found["local_path"]) / "README.md").read_text().split("---\n")[1])
    files = [{"split": "dev", "path": "all/dev.jsonl"}, {"split": "test", "path": "all/test.jsonl"}]
    assert head == {"configs": [{"config_name": "all", "data_files": files}]}
    assert rows(found["local_path"], "all/test.jsonl") == [
        {"question": "What breathes?", "subject": "anatomy", "choices": ["heart", "lung", "skin", "bone"], "answer": 1},
        {"question": "How far, roughly?", "subject": "astronomy", "choices": ["1", "2", "3", "4"], "answer": 3},
        {"question": "Is it bright?", "subject": "astronomy", "choices": ["yes", "no", "maybe", "never"], "answer": 0},
    ]


def test_splits_have_equal_columns(tmp_path):
    found = laid_out(make(tmp_path, "ceval", write(tmp_path / "ceval", CEVAL)), "lm_eval", "ceval")
    assert subsets_of(Path(found["local_path"])) == ["law"]
    (shot,), (asked,) = (rows(found["local_path"], f"law/{split}.jsonl") for split in ("dev", "val"))
    assert list(shot) == list(asked)
    assert (shot["explanation"], asked["explanation"], asked["answer"]) == ("因为如此", "", "A")


def test_what_a_user_says_of_subsets_and_shots_is_kept(tmp_path):
    config = make(tmp_path, "mmlu", write(tmp_path / "mmlu", MMLU))
    config.eval_dataset_args["mmlu"] |= {"subset_list": ["anatomy"], "few_shot_num": 1}
    found = laid_out(config, "lm_eval", "mmlu")
    assert (found["subset_list"], found["few_shot_num"]) == (["anatomy"], 1)


def test_equal_files_are_written_once_and_changed_ones_anew(tmp_path):
    place = write(tmp_path / "mmlu", MMLU)
    config = make(tmp_path, "mmlu", place)
    first = laid_out(config, "lm_eval", "mmlu")["local_path"]
    assert laid_out(config, "lm_eval", "mmlu")["local_path"] == first
    (place / "test" / "anatomy_test.csv").write_text("What thinks?,heart,brain,skin,bone,B\n")
    second = laid_out(config, "lm_eval", "mmlu")["local_path"]
    assert second != first
    assert rows(second, "anatomy/test.jsonl")[0]["question"] == "What thinks?"


def test_a_hubs_folder_is_taken_as_it_is(tmp_path):
    place = write(tmp_path / "mmlu", {"README.md": "---\nconfigs:\n- config_name: all\n---\n"})
    assert laid_out(make(tmp_path, "mmlu", place), "evalscope", "mmlu") == {"local_path": str(place)}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["no front matter", "---\nconfigs: 3\n---\n", "---\n[\n---\n", "---\nconfigs:\n- name: x\n---\n"])
def test_a_readme_that_lists_nothing_is_one_line(tmp_path, text):
    write(tmp_path, {"README.md": text})
    with pytest.raises(DataError, match="does not list subsets"):
        subsets_of(tmp_path)


def test_a_wrong_answer_is_said_with_its_line_and_nothing_is_left(tmp_path):
    place = write(tmp_path / "mmlu", MMLU | {"test/anatomy_test.csv": "What thinks?,heart,brain,skin,bone,E\n"})
    with pytest.raises(DataError, match=r"anatomy_test.csv:1: no row of this task"):
        laid_out(make(tmp_path, "mmlu", place), "evalscope", "mmlu")
    assert not any((tmp_path / "out" / "data").iterdir())


def test_data_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ConfigError, match="which holds the data of mmlu, does not exist"):
        laid_out(make(tmp_path, "mmlu", tmp_path / "absent"), "evalscope", "mmlu")
    write(tmp_path / "empty", {"notes.txt": "nothing"})
    with pytest.raises(DataError, match="has no data of task mmlu"):
        laid_out(make(tmp_path, "mmlu", tmp_path / "empty"), "evalscope", "mmlu")
