import gzip
import json

import pytest

from swift.data.sources import Spec, locate, parse_spec, rows
from swift.errors import DataError

ROW = {"query": "q", "response": "a"}


def read(spec):
    return list(rows(parse_spec(spec)))


def test_json_lines_are_positioned_by_line_and_blank_lines_are_passed_over(write):
    path = write('{"a": 1}\n\n{"a": 2}\n')
    assert read(path) == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": 2})]


def test_a_json_file_may_hold_a_list_one_row_rows_under_data_or_lines(write):
    both = [ROW, {"query": "r", "response": "b"}]
    assert [row for _, row in read(write(json.dumps(both, indent=1), "a.json"))] == both
    assert [row for _, row in read(write(json.dumps(ROW), "b.json"))] == [ROW]
    assert [row for _, row in read(write(json.dumps({"data": both}), "c.json"))] == both
    assert [row for _, row in read(write("\n".join(map(json.dumps, both)), "d.json"))] == both


def test_rows_of_a_json_list_are_positioned_by_index(write):
    path = write(json.dumps([ROW, ROW]), "a.json")
    assert [source for source, _ in read(path)] == [f"{path}[0]", f"{path}[1]"]


def test_csv_and_tsv_have_a_header_and_quoted_newlines(write):
    path = write('query,response\n"two\nlines","a, b"\n', "a.csv")
    assert read(path) == [(f"{path}:3", {"query": "two\nlines", "response": "a, b"})]
    assert read(write("query\tresponse\nq\ta\n", "a.tsv"))[0][1] == ROW


def test_a_csv_row_with_too_many_fields_is_no_object(write):
    assert read(write("query,response\nq,a,b\n", "a.csv"))[0][1] == ["q", "a", "b"]


def test_parquet_is_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"query": ["q"], "response": ["a"]}), path)
    assert read(str(path)) == [(f"{path}[0]", ROW)]


def test_each_line_of_a_text_file_that_is_not_empty_is_a_row(write):
    assert [row for _, row in read(write("one\n\n two \n", "a.txt"))] == [{"text": "one"}, {"text": " two "}]


def test_a_byte_order_mark_and_gzip_are_fine(write):
    assert read(write(b"\xef\xbb\xbf" + json.dumps(ROW).encode()))[0][1] == ROW
    assert read(write(gzip.compress(json.dumps(ROW).encode()), "a.jsonl.gz"))[0][1] == ROW


def test_another_encoding_is_one_clear_line(write):
    path = write('{"text": "ok"}\n{"text": "\u66b4\u96ea"}'.encode("gb18030"))
    with pytest.raises(DataError, match=r"rows.jsonl:2 is not UTF-8 \(byte 0xb1 at column 11\)") as caught:
        read(path)
    assert caught.value.hint.startswith("convert it: iconv -f GB18030")


def test_malformed_json_names_line_and_column(write):
    with pytest.raises(DataError, match=r"rows.jsonl:2: not JSON at column 7: Expecting value"):
        read(write('{"a": 1}\n{"a": }\n'))
    with pytest.raises(DataError, match=r"a.json:3: not JSON at column 1"):
        read(write('[\n{"a": 1},\n]', "a.json"))


def test_an_empty_file_is_an_error(write):
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt"):
        with pytest.raises(DataError, match="has no rows"):
            read(write("", name))


def test_lines_are_read_one_by_one(write):
    found = rows(parse_spec(write('{"a": 1}\nnot json\n')))
    assert next(found)[1] == {"a": 1}
    with pytest.raises(DataError):
        next(found)


def test_a_missing_file_suggests_its_neighbour(write):
    path = write([ROW], "training.jsonl")
    with pytest.raises(DataError, match="does not exist") as caught:
        read(path.replace("training", "trainin"))
    assert caught.value.hint == f"did you mean {path}?"


def test_an_unknown_format_lists_the_known_ones(write):
    with pytest.raises(DataError, match="not a data file") as caught:
        read(write("x", "a.docx"))
    assert ".parquet" in caught.value.hint


def test_a_folder_gives_all_its_data_files_in_order(write, tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.csv"):
        write("query,response\nq,a\n" if name.endswith("csv") else [ROW], name)
    write("not data", "README.md")
    write("{}", "dataset_infos.json")
    assert [path.name for path in locate(parse_spec(str(tmp_path)))] == ["a.jsonl", "b.jsonl", "c.csv"]


def test_a_folder_with_splits_is_read_for_training_and_says_so(write, tmp_path, capsys):
    for name in ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"):
        write([ROW], name)
    assert [path.name for path in locate(parse_spec(str(tmp_path)))] == ["train-00000-of-00001.jsonl"]
    assert "reading the train split (1 of 2 files; not read: test)" in capsys.readouterr().err
    assert [path.name for path in locate(parse_spec(f"{tmp_path}:test"))] == ["test-00000-of-00001.jsonl"]


def test_subsets_are_folders_or_configurations_of_the_card(write, tmp_path):
    write([ROW], "en/a.jsonl")
    write([ROW], "zh/a.jsonl")
    write([ROW], "other.jsonl")
    card = "---\nconfigs:\n- config_name: extra\n  data_files:\n  - split: train\n    path: other.jsonl\n---\n"
    write(card, "README.md")
    assert [path.parent.name for path in locate(parse_spec(f"{tmp_path}:en/zh"))] == ["en", "zh"]
    assert [path.name for path in locate(parse_spec(f"{tmp_path}:extra"))] == ["other.jsonl"]
    with pytest.raises(DataError, match="no subset 'extrra'") as caught:
        locate(parse_spec(f"{tmp_path}:extrra"))
    assert caught.value.hint == "did you mean 'extra'?"


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("owner/name", Spec("owner/name")),
        ("hf::owner/name:a/b#20", Spec("owner/name", "hf", ("a", "b"), 20)),
        ("ms::owner/name#5", Spec("owner/name", "ms", (), 5)),
        ("swift::snow-alerts:validation", Spec("snow-alerts", "swift", ("validation",))),
        ("rows.jsonl#3", Spec("rows.jsonl", None, (), 3)),
    ],
)
def test_the_ways_to_write_a_data_set(text, spec):
    assert parse_spec(text) == spec


def test_a_file_whose_name_holds_a_colon_and_a_hash_is_that_file(write):
    path = write([ROW], "a:b#3.jsonl")
    assert parse_spec(path) == Spec(path)
    assert parse_spec(f"{path}#2") == Spec(path, None, (), 2)


@pytest.mark.parametrize("text", ["gh::owner/name", "rows.jsonl#0"])
def test_what_cannot_be_meant_is_refused(text):
    with pytest.raises(DataError):
        parse_spec(text)


def test_an_id_is_resolved_by_the_hub_and_read_as_a_folder(write, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from swift import hub

    write([ROW], "train.jsonl")
    asked = []

    def resolve(reference, **options):
        asked.append((reference, options))
        return SimpleNamespace(path=tmp_path)

    monkeypatch.setattr(hub, "resolve", resolve)
    assert next(rows(parse_spec("hf::owner/name"), offline=True))[1] == ROW
    assert read("owner/name@v2")[0][1] == ROW
    assert asked == [
        ("hf::owner/name", {"repo_type": "dataset", "offline": True}), ("owner/name@v2", {"repo_type": "dataset"}),
    ]  # fmt: skip


def test_a_missing_folder_in_a_folder_that_exists_is_no_id(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write([ROW], "mine/news/a.jsonl")
    with pytest.raises(DataError, match="mine/newz does not exist") as caught:
        read("mine/newz")
    assert caught.value.hint == "did you mean mine/news?"


def test_the_built_in_data_set_is_known_by_name_and_a_near_name_is_suggested():
    assert len(read("snow-alerts")) == 480
    assert len(read("snow-alerts:validation")) == 60
    with pytest.raises(DataError) as caught:
        read("snow-alert")
    assert "snow-alerts" in caught.value.hint
