"""TensorRT: the ONNX model in onnxruntime, the shapes of its inputs, and NVIDIA's own parser and builder where they are installed.

TensorRT for RTX parses and builds without a GPU, and its packages are on PyPI (extra tensorrt-rtx); nothing here runs an engine.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

from swift.config.export import ExportConfig
from swift.config.options import build as options
from swift.errors import ConfigError, DependencyError, MachineError, ModelError
from swift.export import tensorrt
from swift.export.folder import whole_folder
from swift.export.run import run_export
from swift.export.tensorrt import build_engine, operators, profiles
from swift.model.artifact import ModelFolder
from swift.quantize.measure import Reference
from tests.tiny import make_model

TEXTS = [list(range(3, 40))]
SMALL = {"tensorrt_max_batch_size": 2, "tensorrt_max_input_len": 16, "tensorrt_max_seq_len": 48}


def config_of(folder: Path, **changes) -> ExportConfig:
    return options(ExportConfig, ("test", {"model": str(folder), "to": "tensorrt", **SMALL, **changes}))


def graph_of(*nodes, file: Path) -> Path:
    """An ONNX file of ``nodes``, which read x (2,) and write y (2,)."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    onnx.save(helper.make_model(helper.make_graph(list(nodes), "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 18)]), file)
    return file


def test_two_profiles_hold_prompts_and_single_tokens(tmp_path):
    inputs = {"input_ids": (None, None), "attention_mask": (None, None), "past_key_values.0.key": (None, 2, None, 8)}
    config = config_of(tmp_path, tensorrt_max_batch_size=4, tensorrt_max_input_len=100, tensorrt_max_seq_len=256)
    prompt, token = profiles.profiles(config, inputs)
    assert prompt == {
        "input_ids": [[1, 1], [1, 50], [4, 100]],
        "attention_mask": [[1, 1], [1, 50], [4, 256]],
        "past_key_values.0.key": [[1, 2, 0, 8], [1, 2, 0, 8], [4, 2, 156, 8]],
    }
    assert token == {
        "input_ids": [[1, 1], [1, 1], [4, 1]],
        "attention_mask": [[1, 2], [1, 129], [4, 256]],
        "past_key_values.0.key": [[1, 2, 1, 8], [1, 2, 128, 8], [4, 2, 255, 8]],
    }


def test_trtexec_is_told_the_same_shapes(tmp_path):
    words = profiles.trtexec_arguments([{"input_ids": [[1, 1], [1, 8], [2, 16]], "past.0": [[1, 2, 0, 8], [1, 2, 4, 8], [2, 2, 9, 8]]}])
    assert words == [
        "trtexec",
        "--onnx=model.onnx",
        "--saveEngine=model.engine",
        "--profile=0",
        "--minShapes=input_ids:1x1,past.0:1x2x0x8",
        "--optShapes=input_ids:1x8,past.0:1x2x4x8",
        "--maxShapes=input_ids:2x16,past.0:2x2x9x8",
    ]


def test_an_input_of_unknown_shape_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no shapes are known for the input pixel_values"):
        profiles.profiles(config_of(tmp_path), {"pixel_values": (None, 3)})


def test_operators_that_tensorrt_does_not_know_are_named(tmp_path):
    nodes = [helper.make_node("Det", ["x"], ["a"]), helper.make_node("FusedGelu", ["a"], ["y"], domain="com.microsoft")]
    assert operators.unknown(graph_of(*nodes, file=tmp_path / "m.onnx")) == ["Det", "com.microsoft::FusedGelu"]


def test_operators_inside_of_branches_are_seen(tmp_path):
    branch = helper.make_graph(
        [helper.make_node("BitShift", ["x", "x"], ["b"])], "b", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])]
    )
    node = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    assert operators.unknown(graph_of(node, file=tmp_path / "m.onnx")) == ["BitShift"]


def test_operators_that_tensorrt_knows_pass(tmp_path):
    assert operators.unknown(graph_of(helper.make_node("Relu", ["x"], ["y"]), file=tmp_path / "m.onnx")) == []


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3)])
def test_the_model_that_an_engine_is_built_of_computes_the_same(precision, tolerance, tmp_path):
    config = config_of(make_model(tmp_path / "m"), tensorrt_precision=precision)
    model = ModelFolder(tmp_path / "m", "tiny")
    (tmp_path / "out").mkdir()
    tensorrt.check(model, config)
    artifact = tensorrt.run(model, config, tmp_path / "out")
    measured = tensorrt.verify(artifact, Reference(model, TEXTS), config)
    assert measured.largest_difference < tolerance
    assert measured.same_token == 1.0
    assert "the engine was not run" in measured.notes
    assert "no engine was built" in measured.notes[0]
    subprocess.run(["sh", "-n", str(tmp_path / "out" / "trtexec.sh")], check=True)


def test_numbers_are_of_the_type_that_was_asked_for(tmp_path):
    config = config_of(make_model(tmp_path / "m"), tensorrt_precision="bf16")
    model = ModelFolder(tmp_path / "m", "tiny")
    (tmp_path / "out").mkdir()
    artifact = tensorrt.run(model, config, tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    kinds = {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    assert kinds == {TensorProto.INT64, TensorProto.BFLOAT16}
    weights = {np.prod(initializer.dims): initializer.data_type for initializer in graph.initializer if len(initializer.dims) == 2}
    assert set(weights.values()) == {TensorProto.BFLOAT16}
    measured = tensorrt.verify(artifact, Reference(model, TEXTS), config)
    assert measured.kl is None
    assert "no bfloat16 arithmetic" in measured.notes[-1]


def test_weights_that_16_bits_do_not_hold_are_named(tmp_path):
    make_model(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.weight holds numbers too large for 16 bits"):
        run_export(config_of(tmp_path / "m", output_dir=str(tmp_path / "out")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_activations_that_16_bits_do_not_hold_are_found(tmp_path):
    make_model(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name in ("q", "k"):
        tensors[f"model.layers.0.self_attn.{name}_proj.weight"] *= 3e4  # every number fits, the scores do not
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="computes numbers too large for float16"):
        run_export(config_of(tmp_path / "m", output_dir=str(tmp_path / "out"), quant_eval_samples=1, max_length=32))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    model = ModelFolder(make_model(tmp_path / "m"), "tiny")
    with pytest.raises(MachineError, match="No space left"), whole_folder(tmp_path / "out") as folder:
        (folder / "model.onnx.data").symlink_to("/dev/full")
        tensorrt.run(model, config_of(model.path), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_the_script_says_which_package_is_missing(tmp_path):
    file = Path(build_engine.__file__)
    done = subprocess.run([sys.executable, "-S", str(file)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (1, "No module named 'tensorrt'")


def test_a_missing_tensorrt_for_rtx_names_the_extra(tmp_path, monkeypatch):
    for name in ("tensorrt_rtx", "onnxruntime_ep_nv_tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyError, match="the package onnxruntime_ep_nv_tensorrt_rtx is not installed") as caught:
        tensorrt.check(ModelFolder(tmp_path, "tiny"), config_of(tmp_path, tensorrt_library="rtx"))
    assert caught.value.hint == "pip install 'swift-llm[tensorrt-rtx]'"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensorrt_compute_capability": ["8.6"]}, "--tensorrt_compute_capability"),
        ({"torch_dtype": "float16"}, "--torch_dtype"),
        ({"tensorrt_tp_size": 2}, "--tensorrt_tp_size"),
        ({"to": "onnx", **dict.fromkeys(SMALL)}, None),
    ],
)
def test_options_without_effect_are_refused(changes, said, tmp_path):
    if said is None:
        with pytest.raises(ConfigError, match="--tensorrt_precision"):
            options(ExportConfig, ("test", {"model": str(tmp_path), "to": "onnx", "tensorrt_precision": "bf16"}))
        return
    with pytest.raises(ConfigError, match=said):
        config_of(tmp_path, **changes)


@pytest.fixture
def rtx():
    """TensorRT for RTX, whose builder works without a GPU."""
    try:
        return build_engine.library("rtx")
    except ImportError:
        pytest.skip("the packages of the extra tensorrt-rtx are not installed")


def test_tensorrt_for_rtx_builds_an_engine_without_a_gpu(rtx, tmp_path):
    folder = run_export(
        config_of(
            make_model(tmp_path / "m"),
            tensorrt_library="rtx",
            tensorrt_compute_capability=["8.6", "8.9"],
            output_dir=str(tmp_path / "out"),
            quant_eval_samples=1,
            max_length=32,
        )
    )
    report = json.loads((folder / "swift_report.json").read_text())
    assert report["notes"][0] == f"the engine was built by TensorRT for RTX {rtx.__version__}"
    assert report["bytes_after"] == (folder / "model.engine").stat().st_size > 100_000


def test_the_script_in_the_folder_builds_the_engine(rtx, tmp_path):
    model = ModelFolder(make_model(tmp_path / "m"), "tiny")
    (tmp_path / "out").mkdir()
    artifact = tensorrt.run(model, config_of(model.path), tmp_path / "out")
    assert "accepts the model" in artifact.facts["note"]
    words = [sys.executable, "build_engine.py", "--library", "rtx", "--capability", "8.6"]
    done = subprocess.run(words, cwd=tmp_path / "out", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "wrote model.engine\n"), done.stderr
    assert (tmp_path / "out" / "model.engine").stat().st_size > 100_000


def test_what_nvidias_parser_says_is_one_line(rtx, tmp_path):
    file = graph_of(helper.make_node("Det", ["x"], ["y"]), file=tmp_path / "m.onnx")
    with pytest.raises(build_engine.BuildError, match="Det"):
        build_engine.Network(rtx, file)


def test_a_profile_that_does_not_fit_is_refused(rtx, tmp_path):
    network = build_engine.Network(rtx, graph_of(helper.make_node("Relu", ["x"], ["y"]), file=tmp_path / "m.onnx"))
    with pytest.raises(build_engine.BuildError, match="x"):
        network.build([{"x": [[2], [3], [3]]}], ["8.6"])


def test_a_compute_capability_that_is_not_known_is_refused(rtx, tmp_path):
    config = config_of(tmp_path, tensorrt_library="rtx", tensorrt_compute_capability=["3.5"])
    with pytest.raises(ConfigError, match=r"3.5 is not known to TensorRT for RTX"):
        tensorrt.check(ModelFolder(tmp_path, "tiny"), config)


def test_the_list_of_operators_is_what_the_parser_says(rtx):
    log = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(log)
    network = builder.create_network(0)
    parser = rtx.OnnxParser(network, log)
    names = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert {name for name in names if parser.supports_operator(name)} == operators.known() & names
