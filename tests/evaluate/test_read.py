"""Rows as authors publish them, and what is said of those that cannot be asked."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from swift.errors import ConfigError, DataError, HubError, InputError
from swift.evaluate.read import Data, read, rows
from swift.evaluate.settings import settings_of
from swift.evaluate.spec import find_task
from tests.evaluate.rows import eval_config, make_ceval, make_mmlu, make_ocnli, write


def data_of(name: str, folder: Path | None = None, **options: Any) -> Data:
    spec = find_task(name)
    place = {} if folder is None else {"eval_data_dir": str(folder)}
    return read(spec, settings_of(spec, eval_config(**{"eval_num_fewshot": 0, **place, **options})))


def refusal(name: str, folder: Path | None = None, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        data_of(name, folder, **options)
    assert "\n" not in caught.value.message
    return caught.value


def test_csv_files_without_a_header_are_read(tmp_path: Path) -> None:
    data = data_of("mmlu", make_mmlu(tmp_path), eval_num_fewshot=2)
    assert [example.id for example in data.examples] == ["astronomy/0", "astronomy/1", "marketing/0"]
    first = data.examples[0]
    assert (first.category, first.fields["question"], first.fields["choices"]) == (
        "astronomy", "Which is\nhot, and far?", ["Ice", "Snow", "The Sun", "Rain"],
    )  # fmt: skip
    assert [shot.fields["question"] for shot in data.shots_for("marketing")] == ["Who buys?", "What sells?"]
    assert data.counts == {"subjects of which there are no data": 55}


def test_a_byte_order_mark_and_columns_that_only_some_files_have_do_no_harm(tmp_path: Path) -> None:
    data = data_of("ceval", make_ceval(tmp_path), eval_num_fewshot=1)
    assert [example.id for example in data.examples] == ["law/0", "law/1"]
    assert data.shots_for("law")[0].fields["explanation"].startswith("1. 议会立法。\n2.")


def test_rows_without_a_majority_label_are_left_out_and_counted(tmp_path: Path) -> None:
    data = data_of("ocnli", make_ocnli(tmp_path))
    assert [example.id for example in data.examples] == ["0", "2"]
    assert data.counts == {"no majority label (-)": 1}


def test_rows_that_solved_examples_are_taken_from_are_not_counted(tmp_path: Path) -> None:
    write(make_ocnli(tmp_path) / "train.json", (tmp_path / "dev.json").read_text(encoding="utf-8"))
    data = data_of("ocnli", tmp_path, eval_num_fewshot=2)
    assert data.counts == {"no majority label (-)": 1}
    assert [shot.id for shot in data.shots_for("")] == ["train:0", "train:2"]


def test_a_folder_of_folders_named_like_the_tasks_is_read(tmp_path: Path) -> None:
    make_mmlu(tmp_path / "mmlu")
    make_ceval(tmp_path / "C-Eval")
    assert len(data_of("mmlu", tmp_path).examples) == 3
    assert len(data_of("ceval", tmp_path).examples) == 2


def test_an_archive_as_it_was_downloaded_is_read(tmp_path: Path) -> None:
    make_ceval(tmp_path / "unpacked")
    with zipfile.ZipFile(tmp_path / "ceval-exam.zip", "w") as archive:
        for part in ("dev/law_dev.csv", "val/law_val.csv"):
            archive.write(tmp_path / "unpacked" / part, f"ceval-exam/{part}")
    inside = data_of("ceval", tmp_path, eval_num_fewshot=1)
    assert inside.digest == data_of("ceval", tmp_path / "unpacked", eval_num_fewshot=1).digest
    assert inside.where["law/0"].endswith("ceval-exam.zip/ceval-exam/val/law_val.csv:2")


def test_parquet_in_an_archive_is_refused_in_one_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mmlu.zip", "w") as archive:
        archive.writestr("astronomy/test-0.parquet", b"PAR1")
    said = refusal("mmlu", tmp_path)
    assert said.message.endswith("test-0.parquet: parquet is not read out of an archive") and said.hint == "unpack it"


def test_parquet_files_of_a_hub_hold_the_same_questions(tmp_path: Path) -> None:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    raw = data_of("mmlu", make_mmlu(tmp_path / "raw"), eval_num_fewshot=2)
    for split, examples in (("test", raw.examples), ("dev", [shot for shots in raw.shots.values() for shot in shots])):
        for subject in ("astronomy", "marketing", "all"):
            table = [
                {"question": one.fields["question"], "choices": one.fields["choices"], "answer": "ABCD".index(one.fields["answer"])}
                for one in examples
                if one.category == subject or subject == "all"
            ]
            path = tmp_path / "hub" / subject / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    hub = data_of("mmlu", tmp_path / "hub", eval_num_fewshot=2)
    assert [(one.id, one.fields["question"], one.fields["choices"]) for one in hub.examples] == [
        (one.id, one.fields["question"], one.fields["choices"]) for one in raw.examples
    ]


def test_limit_takes_the_first_of_each_subject_and_changes_no_digest(tmp_path: Path) -> None:
    whole, limited = data_of("mmlu", make_mmlu(tmp_path)), data_of("mmlu", tmp_path, eval_limit=1)
    assert [example.id for example in limited.examples] == ["astronomy/0", "marketing/0"]
    assert limited.digest == whole.digest


def test_a_changed_answer_changes_the_digest(tmp_path: Path) -> None:
    before = data_of("mmlu", make_mmlu(tmp_path)).digest
    write(tmp_path / "test" / "marketing_test.csv", "What is paid?,A price,A tree,A cloud,A fish,B\n")
    assert data_of("mmlu", tmp_path).digest != before


@pytest.mark.parametrize(
    ("wanted", "ids", "missing"),
    [(["marketing"], ["marketing/0"], 0), (["Other"], ["marketing/0"], 13), (["STEM", "astronomy"], ["astronomy/0", "astronomy/1"], 17)],
)
def test_subsets_are_subjects_or_groups(tmp_path: Path, wanted: list[str], ids: list[str], missing: int) -> None:
    data = data_of("mmlu", make_mmlu(tmp_path), eval_dataset_args={"mmlu": {"subset_list": wanted, "few_shot_num": 2}})
    assert [example.id for example in data.examples] == ids
    assert data.counts.get("subjects of which there are no data", 0) == missing


def test_a_subject_without_a_file_is_refused(tmp_path: Path) -> None:
    said = refusal("mmlu", make_mmlu(tmp_path), eval_dataset_args={"mmlu": {"subset_list": ["virology"]}})
    assert said.message == f"{tmp_path}: split test has no subject 'virology'"


def test_files_of_another_kind_beside_those_that_are_read_are_counted(tmp_path: Path) -> None:
    row = '{"question": "Hot?", "A": "Ice", "B": "Fire", "answer": "B"}\n'
    write(tmp_path / "one_val.csv", "question,A,B,answer\nHot?,Ice,Fire,B\n")
    assert data_of("general_mcq", tmp_path).counts == {}
    write(tmp_path / "two_val.jsonl", row)
    data = data_of("general_mcq", tmp_path)
    assert [example.id for example in data.examples] == ["one/0"]
    assert data.counts == {"files of another kind beside these, not read": 1}


def test_a_single_file_of_a_subject_is_asked_as_that_subject(tmp_path: Path) -> None:
    make_mmlu(tmp_path)
    path = tmp_path / "test" / "astronomy_test.csv"
    other = write(tmp_path / "mine.csv", path.read_text(encoding="utf-8"))
    for file, category in ((path, "astronomy"), (other, "")):
        data = data_of("mmlu", eval_dataset_args={"mmlu": {"local_path": str(file)}})
        assert {example.category for example in data.examples} == {category}


def test_a_file_of_the_user_is_a_task(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", '{"question": "Hot?", "A": "Ice", "B": "Fire", "answer": "B"}\n')
    data = data_of("general_mcq", eval_dataset_args={"general_mcq": {"local_path": str(path)}})
    assert data.examples[0].fields["options"] == {"A": "Ice", "B": "Fire"}


def test_a_list_in_json_and_a_tab_separated_table_are_read(tmp_path: Path) -> None:
    listed = write(tmp_path / "a.json", json.dumps([{"q": 1}, {"q": 2}]))
    assert list(rows(listed)) == [(f"{listed}[0]", {"q": 1}), (f"{listed}[1]", {"q": 2})]
    table = write(tmp_path / "a.tsv", "q\ta\n1\tx, y\n")
    assert list(rows(table)) == [(f"{table}:2", {"q": "1", "a": "x, y"})]


# Bad input: one line each, with file, line and what would work.


def test_another_encoding_is_named_with_file_line_and_remedy(tmp_path: Path) -> None:
    make_ceval(tmp_path)
    text = "id,question,A,B,C,D,answer\n0,谁审判？,云,法院,鱼,树,B\n"
    path = write(tmp_path / "val" / "law_val.csv", text, encoding="gb18030")
    said = refusal("ceval", tmp_path)
    assert said.message.startswith(f"{path}:2 is not UTF-8")
    assert said.hint is not None and "iconv -f GB18030 -t UTF-8" in said.hint


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    make_ceval(tmp_path)
    path = write(tmp_path / "val" / "law_val.csv", "id,Question,A,B,C,D,answer\n0,谁？,云,法院,鱼,树,B\n")
    said = refusal("ceval", tmp_path)
    assert said.message == f"{path}:2: column 'question' is missing; found 'id', 'Question', 'A', 'B', 'C', 'D', 'answer'"
    assert said.hint == "is it 'Question'? rename it"


def test_a_column_without_a_value_is_named_unless_the_row_is_left_out(tmp_path: Path) -> None:
    rows = '{"sentence1": "a", "sentence2": "b", "label": "-"}\n{"sentence1": "a", "sentence2": null, "label": "-"}\n'
    path = write(tmp_path / "dev.json", rows + '{"sentence1": "a", "sentence2": null, "label": "neutral"}\n')
    assert refusal("ocnli", tmp_path).message == f"{path}:3: column 'sentence2' has no value"


def test_a_row_with_too_many_fields_is_named(tmp_path: Path) -> None:
    make_mmlu(tmp_path)
    path = write(tmp_path / "test" / "marketing_test.csv", "What is paid?,A price,A tree,A cloud,A fish,A\nWhat, then?,a,b,c,d,A\n")
    said = refusal("mmlu", tmp_path)
    assert said.message == f"{path}:2: 7 fields, not 6 (question, A, B, C, D, answer)"


def test_a_quoted_text_that_does_not_end_is_named(tmp_path: Path) -> None:
    make_mmlu(tmp_path)
    path = write(tmp_path / "test" / "marketing_test.csv", 'What is paid?,"A price,A tree,A cloud,A fish,A\nAnd now?,a,b,c,d,A\n')
    assert refusal("mmlu", tmp_path).message.startswith(f"{path}:1: 2 fields, not 6")


def test_duplicate_ids_are_named_with_both_places(tmp_path: Path) -> None:
    make_ceval(tmp_path)
    path = write(tmp_path / "val" / "law_val.csv", "id,question,A,B,C,D,answer\n7,a,1,2,3,4,B\n7,b,1,2,3,4,C\n")
    assert refusal("ceval", tmp_path).message == f"{path}:3: id 'law/7' was at {path}:2 already"


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    make_ceval(tmp_path)
    write(tmp_path / "val" / "law_val.csv", "id,question,A,B,C,D,answer\n")
    assert refusal("ceval", tmp_path).message == f"{tmp_path}: split val of task ceval is empty"
    write(tmp_path / "ocnli" / "dev.json", '{"sentence1":"a","sentence2":"b","label":"-","prem_id":"1"}\n')
    assert refusal("ocnli", tmp_path / "ocnli").hint == "left out: 1 (no majority label (-))"


def test_a_subject_that_nobody_knows_is_refused_with_a_near_one(tmp_path: Path) -> None:
    path = write(make_mmlu(tmp_path) / "test" / "astronomi_test.csv", "a,1,2,3,4,A\n")
    said = refusal("mmlu", tmp_path)
    assert said.message == f"{path}: task mmlu has no subject 'astronomi'"
    assert said.hint == "did you mean 'astronomy'?"
    said = refusal("mmlu", tmp_path, eval_dataset_args={"mmlu": {"subset_list": ["marketting"]}})
    assert (said.message, said.hint) == ("task mmlu has no subject 'marketting'", "did you mean 'marketing'?")


def test_a_folder_without_the_files_says_what_was_wanted_and_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "nothing")
    said = refusal("mmlu", tmp_path)
    assert said.message == f"--eval_data_dir: {tmp_path} has no data of task mmlu; it holds notes.txt"
    assert said.hint is not None and "test/{category}_test.csv" in said.hint and "https://github.com/hendrycks/test" in said.hint
    said = refusal("mmlu", tmp_path / "nowhere")
    assert said.message == f"--eval_data_dir: {tmp_path / 'nowhere'} does not exist"


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "mmlu.zip", "no archive")
    assert refusal("mmlu", tmp_path).message.startswith(f"{path} is no whole archive")


def test_a_missing_split_of_solved_examples_is_named(tmp_path: Path) -> None:
    make_ceval(tmp_path)
    (tmp_path / "dev" / "law_dev.csv").unlink()
    said = refusal("ceval", tmp_path, eval_num_fewshot=1)
    assert said.message == f"{tmp_path} has no split dev of task ceval: no file dev/{{category}}_dev.csv"
    assert len(data_of("ceval", tmp_path).examples) == 2


def test_without_data_and_network_the_folder_option_is_named() -> None:
    with pytest.raises(HubError) as caught:
        data_of("mmlu", offline=True, use_hf=True)
    assert caught.value.hint is not None and "--eval_data_dir" in caught.value.hint
    with pytest.raises(DataError, match="task general_mcq needs your data"):
        data_of("general_mcq")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mmlu": {"few_shot": 3}}, "--eval_dataset_args: mmlu has no setting 'few_shot'"),
        ({"mmlu": {"few_shot_num": -1}}, "few_shot_num of mmlu is -1"),
        ({"mmlu": {"subset_list": 3}}, "subset_list of mmlu is 3"),
        ({"mmlu": 3}, "mmlu is 3, not an object"),
        ({"mmul": {"few_shot_num": 3}}, "'mmul' is no task that is asked"),
        ({"mmlu": {"num_samples": 3}}, "num_samples of mmlu has no effect in mode letter"),
        ({"mmlu": {"local_path": 3}}, "local_path of mmlu is 3, not a text"),
    ],
)
def test_wrong_settings_of_a_task_are_refused(given: dict[str, Any], message: str) -> None:
    spec = find_task("mmlu")
    with pytest.raises(ConfigError) as caught:
        settings_of(spec, eval_config(eval_dataset_args=given))
    assert message in caught.value.message


def test_settings_are_found_by_any_spelling_of_the_name(tmp_path: Path) -> None:
    text = (
        "name: my-task\ntitle: Mine\nlicence: MIT\nsplit: test\nsource: {layouts: [{splits: {test: [test.jsonl]}}]}\n"
        'shots: {rows: [{q: x, a: A}]}\nmodes:\n  letter: {prompt: "{{ q }}", choices: [A, B], gold: a}\n'
    )
    path = write(tmp_path / "mine.yaml", text)
    for name in ("my-task", "my_task"):
        config = eval_config(eval_dataset=[str(path)], eval_dataset_args={name: {"few_shot_num": 1}})
        assert settings_of(find_task(str(path)), config).num_fewshot == 1
    write(tmp_path / "data" / "my-task" / "test.jsonl", '{"q": "x", "a": "A"}\n')
    write(tmp_path / "data" / "other" / "x.jsonl", "{}\n")
    assert len(data_of(str(path), tmp_path / "data").examples) == 1


def test_a_task_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="--eval_dataset: task ceval is named twice"):
        settings_of(find_task("ceval"), eval_config(eval_dataset=["ceval", "mmlu", "c-eval"]))


def test_a_mode_that_the_task_does_not_have_is_refused() -> None:
    spec = find_task("gsm8k")
    with pytest.raises(ConfigError, match="task gsm8k has no mode letter") as caught:
        settings_of(spec, eval_config(eval_mode="letter"))
    assert caught.value.hint == "it has: generate"


def test_built_in_data_are_read_beside_a_folder_of_other_tasks(tmp_path: Path) -> None:
    path = write(
        tmp_path / "notices.yaml",
        "name: notices\ntitle: Notices\nlicence: MIT\nsplit: validation\n"
        "source: {built_in: snow-alerts, layouts: [{splits: {validation: [validation.jsonl]}}]}\n"
        'modes:\n  perplexity: {text: "{{ messages[2].content }}"}\n',
    )
    assert data_of(str(path)).digest == data_of(str(path), make_mmlu(tmp_path / "data")).digest
