"""Ranges of shapes that an engine is built for, and the arguments of trtexec that say the same."""

from pathlib import Path

from swift import deps
from swift.config.export import ExportConfig
from swift.errors import ModelError
from swift.export.tensorrt.build_engine import ENGINE, ONNX, Profile

# B texts, N new tokens, P tokens before them; the mask has N + P columns
Sizes = tuple[int, int, int]


def profiles(config: ExportConfig, inputs: dict[str, tuple[int | None, ...]]) -> list[Profile]:
    """Two of them: one for prompts, one for the single tokens that follow, with the shapes of all ``inputs``.

    Sizes that are None vary: the first of an input is B; the second is N, that of the mask N + P, that of keys and values P.
    """
    batch, longest = config.tensorrt_max_batch_size, config.tensorrt_max_seq_len
    new = min(config.tensorrt_max_input_len, longest)
    prompt: list[Sizes] = [(1, 1, 0), (1, max(1, new // 2), 0), (batch, new, longest - new)]
    token: list[Sizes] = [(1, 1, 1), (1, 1, max(1, longest // 2)), (batch, 1, longest - 1)]
    return [{name: [_shape(name, shape, size) for size in sizes] for name, shape in inputs.items()} for sizes in (prompt, token)]


def _shape(name: str, shape: tuple[int | None, ...], sizes: Sizes) -> list[int]:
    batch, new, past = sizes
    if name.startswith("past"):
        second = past
    elif name == "attention_mask":
        second = new + past
    elif name in ("input_ids", "position_ids"):
        second = new
    else:
        raise ModelError(f"no shapes are known for the input {name}")
    variable = iter((batch, second))
    return [next(variable) if size is None else size for size in shape]


def trtexec_arguments(found: list[Profile]) -> list[str]:
    """trtexec and its arguments, as samples/common/sampleOptions.cpp of TensorRT 11 reads them."""
    words = ["trtexec", f"--onnx={ONNX}", f"--saveEngine={ENGINE}"]
    for number, profile in enumerate(found):
        words.append(f"--profile={number}")
        for place, kind in enumerate(("min", "opt", "max")):
            listed = ",".join(f"{name}:{'x'.join(map(str, shapes[place]))}" for name, shapes in profile.items())
            words.append(f"--{kind}Shapes={listed}")
    return words


def input_shapes(path: Path) -> dict[str, tuple[int | None, ...]]:
    """{input: shape} of an ONNX file, with None for sizes that vary."""
    onnx = deps.require("onnx", extra="onnx")
    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {initializer.name for initializer in graph.initializer}
    return {
        value.name: tuple(size.dim_value if size.HasField("dim_value") else None for size in value.type.tensor_type.shape.dim)
        for value in graph.input
        if value.name not in weights
    }
