import json

from swift.model.artifact import ModelFolder


def names(folder):
    return [path.name for path in ModelFolder(folder, "m").weight_files]


def test_weights_that_lie_in_a_folder_twice_count_once(tmp_path):
    """As of Mistral, whose repositories hold them in the layout of another library too."""
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in ["consolidated.safetensors", *parts]:
        (tmp_path / name).touch()
    index = {"weight_map": {"a": parts[1], "b": parts[0], "c": parts[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert names(tmp_path) == parts
    (tmp_path / "model.safetensors").touch()
    assert names(tmp_path) == ["model.safetensors"]


def test_without_index_all_files_are_weights(tmp_path):
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).touch()
    assert names(tmp_path) == ["a.safetensors", "b.safetensors"]
