"""Export to GGUF, which llama.cpp and what is built on it read."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from swift import console
from swift.config.export import ExportConfig
from swift.errors import ModelError, first_line
from swift.export.gguf import child
from swift.export.gguf.about import facts, file_name, generation
from swift.export.gguf.layout import own_fields
from swift.export.gguf.trial import Proof, prove
from swift.export.gguf.vocabulary import TEXT, Vocabulary, vocabulary
from swift.export.gguf.write import Checkpoint, Plan, plan, write_gguf
from swift.hub.gguf import read_model
from swift.hub.safetensors_header import read_header
from swift.model.artifact import Artifact, ModelFolder
from swift.model.tokenizer import load_tokenizer
from swift.quantize.measure import Measured, Reference

# Divergence in nats that rounding to these types may cause; more means that something else is wrong.
ALLOWED = {"f32": 1e-3, "f16": 0.05, "bf16": 0.05}


def check(model: ModelFolder, config: ExportConfig) -> None:
    """See Exporter."""
    if "_k" in config.gguf_type:
        child.require()
    _proof.cache_clear()
    _prepare.cache_clear()
    planned, words = _prepare(model.path)
    if words.warning:
        console.warn(words.warning)
    if not _proof(model.path).window:
        console.warn(
            f"no runtime of GGUF files knows this model's sliding window: "
            f"the file says that texts end with it, after {planned.keys['context_length']} tokens"
        )


def run(model: ModelFolder, config: ExportConfig, folder: Path) -> Artifact:
    """See Exporter."""
    kind = config.gguf_type
    planned, words = _prepare(model.path)
    checkpoint = Checkpoint.open(model.weight_files)
    about = facts(model, kind, checkpoint) | words.keys
    target = folder / file_name(model, kind)
    if "_k" in kind:
        between = folder / "unquantized.gguf"
        write_gguf(between, planned, checkpoint, _exact_type(model), about)
        child.quantize(between, target, about["general.file_type"], torch.get_num_threads())
        between.unlink()
    else:
        write_gguf(target, planned, checkpoint, kind, about)
    return Artifact(folder, f"gguf {kind}", (target.name,), {"architecture": planned.layout.arch, "proved_by": _proof(model.path).reader})


def verify(artifact: Artifact, reference: Reference, config: ExportConfig) -> Measured:
    """See Exporter. ModelError if more is lost than rounding explains."""
    file = artifact.path / artifact.files[0]
    if child.is_installed():
        measured = _verify_by_llama_cpp(file, reference)
    else:
        import transformers

        loaded = read_model(file)
        with torch.no_grad():
            measured = reference.compare(
                f"transformers {transformers.__version__}", lambda ids: loaded(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            )
        measured = replace(measured, notes=("read back by transformers: llama-cpp-python, which would be asked first, is not installed",))
    allowed = ALLOWED.get(config.gguf_type)
    if allowed is not None and not (measured.kl is not None and measured.kl <= allowed):
        raise ModelError(
            f"the written file diverges by {measured.kl:.3g} nats a token, which {config.gguf_type} does not explain; nothing was written",
            hint="--gguf_type bf16 holds larger numbers than f16",
        )
    return measured


def _verify_by_llama_cpp(file: Path, reference: Reference) -> Measured:
    tokenizer = load_tokenizer(reference.model.path)
    with child.opened(file, max(map(len, reference.pieces))) as opened:
        measured = reference.compare(f"llama.cpp in llama-cpp-python {opened.version}", opened.logits)
        if opened.tokenize(TEXT, special=False) == tokenizer.encode(TEXT):
            return measured
    note = "llama.cpp sees other tokens than the model's tokenizer in an unusual text"
    console.warn(note)
    return replace(measured, notes=(*measured.notes, note))


def context_length(model: ModelFolder) -> int:
    """Tokens of a text at most, as the file says."""
    return int(_prepare(model.path)[0].keys["context_length"])


def end_tokens(model: ModelFolder) -> list[int]:
    """Tokens at which answers end."""
    return _ends(model.path, load_tokenizer(model.path))


@lru_cache(maxsize=1)
def _proof(path: Path) -> Proof:
    return prove(_config(path))


@lru_cache(maxsize=1)
def _prepare(path: Path) -> tuple[Plan, Vocabulary]:
    config = own_fields(_config(path))
    proof = _proof(path)
    planned = plan(config, proof.layout, Checkpoint.open(ModelFolder(path, path.name).weight_files), window=proof.window)
    tokenizer = load_tokenizer(path)
    rows = next(target.shape[0] for target in planned.targets if target.name == "token_embd.weight")
    return planned, vocabulary(tokenizer, rows, _ends(path, tokenizer))


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as problem:
        raise ModelError(f"{path}: config.json cannot be read: {first_line(problem)}") from problem


def _ends(path: Path, tokenizer: Any) -> list[int]:
    """The tokenizer's end, and what generation_config.json adds."""
    said = generation(path).get("eos_token_id")
    listed = [] if said is None else [said] if isinstance(said, int) else list(said)
    return list(dict.fromkeys([tokenizer.eos_token_id, *listed]))


def _exact_type(model: ModelFolder) -> str:
    """The smallest type that holds all weights as they are."""
    kinds = {kind for file in model.weight_files for kind, _ in read_header(file).values()}
    return {frozenset({"BF16"}): "bf16", frozenset({"F16"}): "f16"}.get(frozenset(kinds), "f32")
