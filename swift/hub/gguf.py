"""Converts a GGUF file into a model folder: config, safetensors, tokenizer with its chat template.

transformers knows how the names, the rotary layout and the norms of each architecture map; the `gguf` package
dequantizes. Nothing is run through a model.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from swift import console
from swift.deps import require
from swift.errors import DependencyError, ModelError, first_line
from swift.files import machine_error
from swift.hub import gguf_settings

_ROPE_SCALING = "{arch}.rope.scaling.type"


def file_revision(path: Path) -> str:
    """A short name for this state of the file: its path, size and time of change, not its content (that may be many GB)."""
    try:
        stat = path.stat()
    except OSError as problem:
        raise machine_error(problem, path) from problem
    return hashlib.sha256(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:16]


def convert(source: Path, target: Path) -> dict[str, Any]:
    """Write the model in the GGUF file ``source`` to the folder ``target``; returns its licence and its quantization.

    The weights are the dequantized values, bit for bit. Raises ModelError if the file is broken, if its architecture is
    unknown to transformers, or if anything in it has no place in the result.
    """
    reader = _open(source)
    names = sorted({tensor.tensor_type.name for tensor in reader.tensors} - {"F32"}) or ["F32"]
    console.say(f"converting {source.name} ({', '.join(names)}) to safetensors", tensors=len(reader.tensors))
    tokenizer = _tokenizer(source, reader)
    model = _empty(source, reader)
    if length := getattr(model.config, "max_position_embeddings", None):
        tokenizer.model_max_length = length
    tensors = _tensors(source, reader, model)
    dtype = _exact_dtype(list(tensors.values()))
    model.load_state_dict({name: value.to(dtype) for name, value in tensors.items()}, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    with quiet():
        model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return {"licence": _field(reader, "general.license"), "quantized": names}


def read_model(source: Path) -> Any:
    """The model in the GGUF file ``source`` with its dequantized weights in float32. Raises as ``convert``."""
    import torch

    reader = _open(source)
    empty = _empty(source, reader)
    tensors = _tensors(source, reader, empty)
    with quiet():  # this also computes what is no parameter: rotary frequencies
        model = type(empty).from_pretrained(None, config=empty.config, state_dict=tensors, dtype=torch.float32)
    return model.eval()


def read_tokenizer(source: Path) -> Any:
    """The tokenizer that transformers makes of the GGUF file ``source``. Raises as ``convert``."""
    return _tokenizer(source, _open(source))


def _tokenizer(source: Path, reader: Any) -> Any:
    from transformers import AutoTokenizer

    with _explained(source), _parsed(reader):
        return AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)


def _tensors(source: Path, reader: Any, model: Any) -> dict[str, Any]:
    tensors = _dequantize(reader, model)
    _check(source, model, tensors)
    return tensors


def _exact_dtype(tensors: list[Any]) -> Any:
    """The smallest type that holds every value exactly.

    For quantized files that is float32: a Q4_1 value is d * q + m with two float16 numbers and 4 bits, about 15 significant
    bits, and neither float16 (11) nor bfloat16 (8) holds it. (Measured on SmolLM2-135M: 211 of 272 tensors change in either.)
    """
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(dtype).float(), tensor) for tensor in tensors):
            return dtype
    return torch.float32


def _open(source: Path) -> Any:
    try:
        with source.open("rb") as file:
            magic = file.read(4)
    except OSError as problem:
        raise machine_error(problem, source) from problem
    if magic != b"GGUF":
        raise ModelError(f"{source} is no GGUF file: it begins with {magic!r}", hint="fetch the file again")
    base = require("gguf", extra="gguf").GGUFReader

    class Reader(base):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: Any) -> None:
            # A slice of a memmap costs three times one of an array over the same memory, and each token of a vocabulary is two.
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    try:
        return Reader(source)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, AssertionError) as problem:
        raise ModelError(f"{source} is not a whole GGUF file: {problem}", hint="fetch the file again") from problem


def _empty(source: Path, reader: Any) -> Any:
    """The model as the file describes it; its parameters are on the meta device, its buffers are computed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    arch = _field(reader, "general.architecture")
    _check_architecture(source, arch)
    with _explained(source), _parsed(reader):
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        gguf_settings.complete(config, arch, reader)
        config.pad_token_id = _field(reader, "tokenizer.ggml.padding_token_id")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    scaling = _field(reader, _ROPE_SCALING.format(arch=arch))
    if scaling not in (None, "none") and (config.rope_parameters or {}).get("rope_type", "default") == "default":
        raise ModelError(f"{source}: its rotary scaling ({scaling}) is lost in the conversion", hint="use the model's original safetensors")
    model.config.name_or_path = ""
    _set_ends(model, reader)
    return model


@contextlib.contextmanager
def _parsed(reader: Any) -> Iterator[None]:
    """Within, transformers sees what ``reader`` has parsed, where it would parse the file again: seconds for a large vocabulary."""
    import gguf

    names = vars(gguf)
    original, names["GGUFReader"] = names["GGUFReader"], lambda *_, **__: reader
    try:
        yield
    finally:
        names["GGUFReader"] = original


@contextlib.contextmanager
def _explained(source: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, NotImplementedError, AttributeError) as problem:
        raise ModelError(
            f"{source}: transformers cannot read this GGUF file: {first_line(problem)}", hint="use the model's original safetensors"
        ) from problem
    except ImportError as problem:
        raise DependencyError(
            f"reading {source.name} needs a package: {first_line(problem)}", hint="pip install 'swift-llm[gguf]'"
        ) from problem


def _check_architecture(source: Path, arch: Any) -> None:
    """Some architectures are read by another part of transformers, whose tables undo what llama.cpp did; ours would not."""
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:
        return
    if arch in GGUF_ARCHS:
        raise ModelError(f"{source}: GGUF files of architecture {arch!r} are not converted", hint="use the model's original safetensors")


def _set_ends(model: Any, reader: Any) -> None:
    """Generation ends at the end-of-sequence token and, if the file names another one, at the end-of-turn token."""
    ids = {key: _field(reader, f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "padding", "eot")}
    for target in (model.config, model.generation_config):
        target.bos_token_id, target.eos_token_id, target.pad_token_id = ids["bos"], ids["eos"], ids["padding"]
    if ids["eot"] is not None and ids["eos"] is not None and ids["eot"] != ids["eos"]:
        model.generation_config.eos_token_id = [ids["eos"], ids["eot"]]


def _dequantize(reader: Any, model: Any) -> dict[str, Any]:
    """{name in transformers: float32 tensor}; a tensor of the file without a place keeps its name in the file."""
    import torch
    from gguf import dequantize
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    arch = _field(reader, "general.architecture")
    processor = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=model.config.to_dict())
    places = _places(arch, model, processor)
    tensors: dict[str, Any] = {}
    parsed = {"tensors": tensors}  # processors of mixture-of-experts models write here themselves
    for tensor in reader.tensors:
        if tensor.name in gguf_settings.ROPE_TENSORS:
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        done = processor.process(weights=values, name=tensor.name, tensor_key_mapping=places, parsed_parameters=parsed)
        if done.name is not None:
            tensors[places.get(done.name, done.name)] = torch.from_numpy(np.array(done.weights, dtype=np.float32, order="C"))
    return tensors


def _places(arch: str, model: Any, processor: Any) -> dict[str, str]:
    """{name in the file: name in transformers}. (transformers' own function builds the table once a submodule: 5 s more.)"""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == arch)
    table = get_tensor_name_map(number, model.config.num_hidden_layers)
    places: dict[str, str] = {}
    for name in map(processor.preprocess_name, model.state_dict()):
        stem, dot, suffix = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        in_file = table.get_name(stem) or table.get_name(stem.partition(".")[2])
        if in_file is None:
            processor.perform_fallback_tensor_mapping(places, dot + suffix, "", name)
        else:
            places[in_file + dot + suffix] = name
    return places


def _check(source: Path, model: Any, tensors: dict[str, Any]) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    hint = "use the model's original safetensors"
    if extra := sorted(set(tensors) - set(expected)):
        raise ModelError(f"{source}: {len(extra)} tensors have no place in {type(model).__name__}: {', '.join(extra[:3])}", hint=hint)
    if missing := sorted(set(expected) - set(tensors) - tied):
        raise ModelError(f"{source} lacks {len(missing)} tensors of {type(model).__name__}: {', '.join(missing[:3])}", hint=hint)
    for name, value in tensors.items():
        if tuple(value.shape) != expected[name]:
            raise ModelError(f"{source}: {name} has shape {list(value.shape)}, expected {list(expected[name])}", hint=hint)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers: we say what is going on ourselves."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _field(reader: Any, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()
