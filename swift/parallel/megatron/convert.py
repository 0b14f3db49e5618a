"""Megatron's own checkpoints (torch_dist): written of a transformers model, and read back, in one process by itself.

They are written by torch's writer in this process. Megatron-Core's starts two processes and a manager of queues for each
process, which is for asynchronous saving of a training run, and hangs where processes are forked.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from swift.errors import CheckpointError, first_line
from swift.parallel.megatron import package
from swift.parallel.megatron.bridge import Bridge
from swift.parallel.megatron.cpu import on_cpu
from swift.parallel.megatron.describe import describe
from swift.parallel.megatron.model import Layout, build_chunks, join_groups, transformer_config
from swift.parallel.megatron.settings import Settings

RELEASE = "release"  # what Megatron-LM calls weights without a training state
POINTER = "latest_checkpointed_iteration.txt"
CPU = torch.device("cpu")


class Converter:
    """Megatron's model for a transformers model, whose weights may be on the meta device: only its names are read.

    With ``layout``, the part of it that this process of several has; there are no logits then.
    """

    def __init__(self, model: Any, dtype: torch.dtype, layout: Layout | None = None) -> None:
        layout = layout or Layout()
        self.settings, entries = describe(model, list(model.state_dict()), tp=layout.tp)
        groups = join_groups(layout, CPU)
        with on_cpu(), package.quiet():
            self.config = transformer_config(self.settings, layout, device=CPU, dtype=dtype, extra={})
            (self.chunk,) = build_chunks(self.settings, self.config, groups, layout)
        self.chunk.to(dtype)  # torch's norms are made in float32
        self.bridge = Bridge([self.chunk], entries, self.settings.dims, groups)

    def take(self, state_dict: dict[str, Tensor]) -> None:
        """Fill it with Hugging Face's tensors."""
        self.bridge.load(state_dict.__getitem__)

    def give(self) -> dict[str, Tensor]:
        """Hugging Face's tensors of it."""
        return dict(self.bridge.gather())

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """(T, V) of one row of T tokens."""
        row = torch.tensor([ids])
        with on_cpu():
            found: Tensor = self.chunk.eval()(row, torch.arange(len(ids))[None], None)
        return found[0, :, : self.settings.dims.vocab_size]

    def save(self, folder: Path) -> Path:
        """Write the weights into ``folder``, as Megatron-LM's --load reads them; the folder of the files is returned."""
        path = folder / RELEASE
        path.mkdir()
        state = {"model": self._state(), "args": _arguments(self.settings, self.config), "checkpoint_version": 3.0, "iteration": 0}
        with on_cpu(), package.quiet():
            package.part("dist_checkpointing").save(state, str(path), _in_process())
        (folder / POINTER).write_text(RELEASE, encoding="utf-8")
        return path

    def load(self, folder: Path) -> None:
        """Read weights that any layout of processes has written. CheckpointError if they are not this model's."""
        path = checkpoint_in(folder)
        dist_checkpointing = package.part("dist_checkpointing")
        try:
            with on_cpu(), package.quiet():
                found = dist_checkpointing.load({"model": self._state()}, str(path))
                self.chunk.load_state_dict(found["model"], strict=False)  # strict asks for the state of other layers too
        except (OSError, KeyError, ValueError, RuntimeError, dist_checkpointing.core.CheckpointingException) as problem:
            raise CheckpointError(f"{path}: it cannot be read as this model's: {first_line(problem)}") from None

    def _state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.chunk.sharded_state_dict()
        return found


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within, this process is Megatron's only one."""
    was_joined = dist.is_initialized()
    try:
        yield
    finally:
        if dist.is_initialized() and not was_joined:
            package.part("parallel_state").destroy_model_parallel()
            dist.destroy_process_group()


def checkpoint_in(folder: Path) -> Path:
    """Where the files lie: ``folder`` itself, or what its latest_checkpointed_iteration.txt names. CheckpointError if nowhere."""
    path = folder
    if (folder / POINTER).is_file():
        name = (folder / POINTER).read_text(encoding="utf-8").strip()
        path = folder / (f"iter_{int(name):07d}" if name.isdigit() else name)
    if not (path / "metadata.json").is_file():
        raise CheckpointError(f"{folder} is no distributed checkpoint of Megatron-Core", hint="one has metadata.json and .distcp files")
    return path


def _in_process() -> Any:
    """Megatron-Core's way to save, with torch's writer."""
    strategies = package.part("dist_checkpointing.strategies.torch")

    base: Any = strategies.TorchDistSaveShardedStrategy

    class InProcess(base):
        def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
            from torch.distributed.checkpoint.state_dict_saver import save

            renamed, *_ = strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
            planner = strategies.MCoreSavePlanner(dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False)
            save(strategies.mcore_to_pyt_state_dict(renamed, False), storage_writer=FileSystemWriter(checkpoint_dir), planner=planner)

    return InProcess("torch_dist", 1)


def _arguments(settings: Settings, config: Any) -> argparse.Namespace:
    """The options of Megatron-LM that its --use-checkpoint-args takes from a checkpoint."""
    model = settings.model
    named = {
        name: getattr(config, name)
        for name in (
            "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels add_bias_linear add_qkv_bias "
            "normalization attention_dropout hidden_dropout qk_layernorm moe_layer_freq moe_ffn_hidden_size moe_router_topk "
            "moe_router_pre_softmax moe_grouped_gemm".split()
        )
    }
    return argparse.Namespace(
        **named,
        norm_epsilon=config.layernorm_epsilon,
        num_experts=config.num_moe_experts,
        group_query_attention=config.num_query_groups != config.num_attention_heads,
        swiglu=settings.transformer["activation_func"] == "silu",
        squared_relu=False,
        seq_length=model["max_sequence_length"],
        max_position_embeddings=model["max_sequence_length"],
        position_embedding_type=model["position_embedding_type"],
        add_position_embedding=False,
        use_rotary_position_embeddings=True,
        rotary_base=model["rotary_base"],
        rotary_percent=model["rotary_percent"],
        rotary_interleaved=False,
        untie_embeddings_and_output_weights=not model["share_embeddings_and_output_weights"],
        padded_vocab_size=model["vocab_size"],
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        ckpt_format="torch_dist",
    )
