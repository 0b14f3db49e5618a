"""TensorRT-LLM checkpoints: config.json and one file of weights for each rank, which trtllm-build makes engines of."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift.config.export import ExportConfig
from swift.errors import ModelError
from swift.export.tensorrt_llm import guide
from swift.export.tensorrt_llm.layouts import Piece, layout_of, parts, pieces, refuse_split
from swift.export.tensorrt_llm.ranks import rank_files
from swift.export.tensorrt_llm.reference import Interpreter
from swift.export.tensorrt_llm.settings import heads_of, settings
from swift.files import write_json
from swift.model.artifact import Artifact, ModelFolder
from swift.model.device import DTYPES
from swift.model.load import checkpoint_dtype
from swift.model.tokenizer import load_tokenizer
from swift.quantize.measure import Measured, Reference
from swift.quantize.tensors import Checkpoint

FORMAT = "tensorrt_llm"
EQUAL_KL = 1e-5  # nats a token: the same numbers, summed in another order
ROUNDED_KL = 0.05  # after rounding to 16 bits, of which Gemma's norms in bfloat16 lose most
NOT_RUN = "TensorRT-LLM itself was not run: it needs an NVIDIA GPU; the weights were read back by swift, as its model definitions say"


class Plan:
    """What is written for a model: made of its config.json and of the headers of its files, before any weight is read."""

    def __init__(self, model: ModelFolder, config: ExportConfig) -> None:
        self.layout = layout_of(model.name, model.config)
        self.config = _read(model)
        self.heads = heads_of(self.config)
        self.ranks = config.tensorrt_tp_size
        layers = self.config.num_hidden_layers
        refuse_split(self.layout, self.heads, self.config.intermediate_size, layers, self.ranks, config.tensorrt_pp_size)
        self.checkpoint = Checkpoint(model.weight_files)
        self.dtype = _dtype(model.path, config)
        names = self.checkpoint.sources.keys()
        self.settings = settings(
            self.config,
            self.layout,
            names,
            dtype=str(self.dtype).removeprefix("torch."),
            ranks=(self.ranks, config.tensorrt_pp_size),
            quant_algo=config.tensorrt_llm_quant_algo,
        )
        self.pieces = pieces(self.layout, names, layers, config.tensorrt_pp_size, tied=bool(self.config.tie_word_embeddings))

    @property
    def is_rounded(self) -> bool:
        """Whether a number may be stored in fewer bits than it has."""
        return any(
            piece.tensors.add or torch.promote_types(self.checkpoint.dtype(source), self.dtype) != self.dtype
            for piece in self.pieces
            for source in piece.tensors.sources
        )

    def shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """{tensor: shape} of each rank's file."""
        found: list[dict[str, tuple[int, ...]]] = [{} for _ in range(self.settings["mapping"]["world_size"])]
        for piece in self.pieces:
            made = parts(piece.tensors, lambda name: torch.empty(self.checkpoint.shape(name), device="meta"), self.heads, self.ranks)
            for rank, part in zip(self.of_stage(piece), made, strict=True):
                found[rank][piece.name] = tuple(part.shape)
        return found

    def of_stage(self, piece: Piece) -> range:
        """Ranks of the pipeline stage of ``piece``."""
        return range(piece.stage * self.ranks, (piece.stage + 1) * self.ranks)

    def read(self, piece: Piece) -> list[Tensor]:
        return parts(piece.tensors, self.checkpoint.read, self.heads, self.ranks)


def check(model: ModelFolder, config: ExportConfig) -> None:
    """ModelError for a model that TensorRT-LLM does not compute, ConfigError for ranks that it cannot be cut for."""
    Plan(model, config).shapes()


def run(model: ModelFolder, config: ExportConfig, folder: Path) -> Artifact:
    """Write the rank files, reading the tensors of one of TensorRT-LLM's at a time."""
    plan = Plan(model, config)
    shapes = plan.shapes()
    with rank_files(folder, shapes, plan.dtype) as files:
        for piece in plan.pieces:
            for rank, part in zip(plan.of_stage(piece), plan.read(piece), strict=True):
                files[rank].write(piece.name, part)
    write_json(folder / "config.json", plan.settings)
    load_tokenizer(model.path).save_pretrained(str(folder / guide.TOKENIZER))
    guide.write(folder, config, plan.settings)
    names = tuple(f"rank{rank}.safetensors" for rank in range(len(shapes)))
    return Artifact(folder, FORMAT, names, {"layout": plan.layout.name, "rounded": plan.is_rounded})


def verify(artifact: Artifact, reference: Reference, config: ExportConfig) -> Measured:
    """Compute with the rank files what TensorRT-LLM's model definition computes; ModelError if that is another model."""
    interpreter = Interpreter(artifact.path, reference.pieces)
    measured = reference.compare("swift's reading of TensorRT-LLM's model definition", interpreter.logits)
    if measured.kl is None or not measured.kl <= (ROUNDED_KL if artifact.facts["rounded"] else EQUAL_KL):
        raise ModelError(
            f"what was written computes another model: {measured.kl:.3g} nats a token away",
            hint="the layout of this architecture does not describe it; nothing was written",
        )
    notes = [NOT_RUN]
    if config.tensorrt_llm_quant_algo:
        notes.append(f"trtllm-build rounds the weights ({config.tensorrt_llm_quant_algo}); what that loses was not measured")
    return Measured(**{**vars(measured), "notes": tuple(notes)})


def _read(model: ModelFolder) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(model.path), local_files_only=True, trust_remote_code=False)


def _dtype(path: Path, config: ExportConfig) -> torch.dtype:
    """--torch_dtype, or that of the checkpoint; float32 becomes float16, as in TensorRT-LLM's own converter."""
    if config.torch_dtype:
        return DTYPES[config.torch_dtype]
    stored = checkpoint_dtype(path)
    return torch.float16 if stored == torch.float32 else stored
