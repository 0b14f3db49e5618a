"""Megatron-Core's model of this process: the groups of processes, its configuration, its GPTModel chunks."""

import contextlib
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from swift.deps import require
from swift.errors import ConfigError
from swift.parallel.megatron.settings import Settings

ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu_pytorch_tanh": partial(torch.nn.functional.gelu, approximate="tanh")}


@dataclass(frozen=True)
class Layout:
    """Processes along each of Megatron's axes; ``vpp`` is the number of runs of layers that a stage has."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    vpp: int = 1

    def check(self, settings: Settings, world_size: int) -> None:
        """ConfigError, in every process, if the model or the number of processes does not divide."""
        needed = self.tp * self.pp
        if world_size % needed or (world_size // needed) % self.ep:
            wanted = f"{needed} x --expert_model_parallel_size {self.ep}" if self.ep > 1 else str(needed)
            raise ConfigError(f"--strategy megatron needs a multiple of {wanted} processes, and there are {world_size}", hint="change one")
        known = settings.transformer
        for value, name, divisor, option in (
            (known["num_attention_heads"], "attention heads", self.tp, "tensor_model_parallel_size"),
            (known["num_query_groups"], "key/value heads", self.tp, "tensor_model_parallel_size"),
            (known["ffn_hidden_size"], "feed-forward rows", self.tp, "tensor_model_parallel_size"),
            (known["num_layers"], "layers", self.pp * self.vpp, "pipeline_model_parallel_size"),
            (known.get("num_moe_experts") or self.ep, "experts", self.ep, "expert_model_parallel_size"),
        ):
            if value % divisor:
                also = f" x --virtual_pipeline_model_parallel_size {self.vpp}" if option.startswith("pipeline") and self.vpp > 1 else ""
                size = self.pp if also else divisor
                raise ConfigError(f"--{option} {size}{also} does not divide the model's {value} {name}", hint="choose a divisor")
        if self.ep > 1 and "num_moe_experts" not in known:
            raise ConfigError(f"--expert_model_parallel_size {self.ep}: the model has no experts", hint="remove it")
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError("--virtual_pipeline_model_parallel_size needs --pipeline_model_parallel_size", hint="say both, or none")


def join_groups(layout: Layout, *, timeout_minutes: int = 30) -> Any:
    """megatron.core.parallel_state, with its groups of processes made: neighbours in rank share a layer."""
    state = require("megatron.core.parallel_state", extra="megatron")
    if state.is_initialized():
        sizes = (state.get_tensor_model_parallel_world_size(), state.get_pipeline_model_parallel_world_size())
        if sizes == (layout.tp, layout.pp) and state.get_expert_model_parallel_world_size() == layout.ep:
            return state
        state.destroy_model_parallel()
    state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        expert_model_parallel_size=layout.ep,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )
    return state


def transformer_config(settings: Settings, layout: Layout, *, device: torch.device, dtype: torch.dtype, extra: dict[str, Any]) -> Any:
    """Megatron's TransformerConfig. ``extra`` are fields that the user has set; ConfigError if Megatron refuses them."""
    module = require("megatron.core.transformer.transformer_config", extra="megatron")
    is_cuda = device.type == "cuda"
    fields: dict[str, Any] = {
        **settings.transformer,
        "activation_func": ACTIVATIONS[settings.transformer["activation_func"]],
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "perform_initialization": False,  # weights come from the checkpoint
        "use_cpu_initialization": not is_cuda,
        "calculate_per_token_loss": True,  # losses are sums: divided once, by the count of the whole step
        # Batches of a step have widths of their own; the dispatcher that runs on a CPU wants one width.
        "variable_seq_lengths": layout.pp > 1 and (is_cuda or "num_moe_experts" not in settings.transformer),
        "gradient_accumulation_fusion": False,  # it adds into main_grad of Megatron's own buffers
        "deallocate_pipeline_outputs": layout.pp > 1,
        "apply_rope_fusion": False,
        "persist_layer_norm": is_cuda,
        "bias_activation_fusion": is_cuda,
        "masked_softmax_fusion": is_cuda,
        "bias_dropout_fusion": is_cuda,
        "moe_token_dispatcher_type": "alltoall",  # said of dense models too, or varying lengths are refused
    }
    if "num_moe_experts" in settings.transformer:
        fields |= {
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall" if is_cuda else "allgather",  # alltoall copies on a stream of CUDA
            "moe_grouped_gemm": False,
        }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about defaults of its own, which nobody has chosen
            return module.TransformerConfig(**{**fields, **extra})
    except (ValueError, AssertionError, TypeError) as problem:
        raise ConfigError(f"Megatron-Core refuses these settings: {str(problem).strip().splitlines()[0]}") from None


def build_chunks(settings: Settings, config: Any, state: Any, layout: Layout) -> list[Any]:
    """The GPTModel of this process; several, with ``layout.vpp``. Their weights are not set yet."""
    specs = require("megatron.core.models.gpt.gpt_layer_specs", extra="megatron")
    gpt = require("megatron.core.models.gpt.gpt_model", extra="megatron")
    has_engine = has_transformer_engine() and not config.use_cpu_initialization
    chunks = []
    for stage in range(layout.vpp):
        number = stage if layout.vpp > 1 else None
        spec = specs.get_gpt_decoder_block_spec(config, use_transformer_engine=has_engine, vp_stage=number)
        chunk = gpt.GPTModel(
            config,
            spec,
            **settings.model,
            pre_process=state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
            post_process=state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
            vp_stage=number,
        )
        chunks.append(chunk)
    return chunks


def has_transformer_engine() -> bool:
    with contextlib.suppress(ImportError, OSError):
        import transformer_engine.pytorch  # noqa: F401

        return True
    return False
