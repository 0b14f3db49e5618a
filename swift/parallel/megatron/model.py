"""Megatron-Core's model of this process: the groups of processes, its configuration, its GPTModel chunks."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed as dist

from swift.errors import ConfigError, first_line
from swift.parallel.megatron import package
from swift.parallel.megatron.context import check_part_attention, use_part_attention, use_part_positions
from swift.parallel.megatron.settings import Settings

ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu_pytorch_tanh": partial(torch.nn.functional.gelu, approximate="tanh")}


@dataclass(frozen=True)
class Layout:
    """Processes along each of Megatron's axes.

    ``cp`` processes share each sequence. ``vpp`` is the number of runs of layers that a stage has. With ``shares_tokens``,
    processes that share a layer share the tokens between its matrices (Megatron's sequence parallelism). With ``is_flat``,
    batches are rows of documents without padding, and attention and positions are ours, as with ``cp``.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    vpp: int = 1
    shares_tokens: bool = False
    is_flat: bool = False

    @property
    def computes_parts(self) -> bool:
        """Whether batches have a layout, which only our attention reads."""
        return self.is_flat or self.cp > 1

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
        if self.tp > 1 and "num_moe_experts" in known and not self.shares_tokens:
            raise ConfigError(
                f"--tensor_model_parallel_size {self.tp}: Megatron-Core trains a model with experts so with --sequence_parallel true alone",
                hint="say it where there is Transformer Engine, or use --expert_model_parallel_size",
            )


def join_groups(layout: Layout, device: torch.device, *, timeout_minutes: int = 30) -> Any:
    """megatron.core.parallel_state, with its groups of processes made anew: neighbours in rank share a layer."""
    state = package.part("parallel_state")
    if not dist.is_initialized():  # one process by itself
        backend = dist.get_default_backend_for_device(device)
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    with package.quiet():
        state.destroy_model_parallel()  # groups of a run before this one
        state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            distributed_timeout_minutes=timeout_minutes,
            create_gloo_process_groups=False,
        )
    return state


def transformer_config(settings: Settings, layout: Layout, *, device: torch.device, dtype: torch.dtype, extra: dict[str, Any]) -> Any:
    """Megatron's TransformerConfig. ``extra`` are fields that the user has set; ConfigError if Megatron refuses them."""
    module = package.part("transformer.transformer_config")
    is_cuda = device.type == "cuda"
    fields: dict[str, Any] = {
        **settings.transformer,
        "activation_func": ACTIVATIONS[settings.transformer["activation_func"]],
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "sequence_parallel": layout.shares_tokens,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "perform_initialization": False,  # weights come from the checkpoint
        "use_cpu_initialization": not is_cuda,
        "calculate_per_token_loss": True,  # losses are sums: divided once, by the count of the whole step
        "gradient_accumulation_fusion": False,  # it adds into main_grad of Megatron's own buffers
        **exchange_settings(layout, is_cuda=is_cuda, has_experts="num_moe_experts" in settings.transformer),
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
        with package.quiet():  # of defaults of its own, which nobody has chosen
            found = module.TransformerConfig(**{**fields, **extra})
    except (ValueError, AssertionError, TypeError) as problem:
        raise ConfigError(f"Megatron-Core refuses these settings: {first_line(problem)}") from None
    if layout.computes_parts:
        check_part_attention(found)
    return found


def exchange_settings(layout: Layout, *, is_cuda: bool, has_experts: bool) -> dict[str, Any]:
    """How stages exchange hidden states.

    Where each of two stages is both the one before and the one after the other, as in an interleaved pipeline of two, what
    is sent in both directions at once must not go through one group: the messages would be taken for one another. Megatron-LM
    refuses that (its --overlap-p2p-communication is on then); the shapes that come before messages of varying length have
    no such way, so an interleaved pipeline has one length for a step. So has the dispatcher of experts that runs on a CPU.
    """
    return {
        "variable_seq_lengths": layout.pp > 1 and layout.vpp == 1 and (is_cuda or not has_experts),
        "overlap_p2p_comm": layout.vpp > 1,
        "batch_p2p_comm": layout.vpp == 1,
        "batch_p2p_sync": is_cuda and layout.vpp == 1,
        # gloo reads what is sent from where it lies, later; CUDA's allocator keeps it until NCCL has.
        "deallocate_pipeline_outputs": layout.pp > 1 and is_cuda,
    }


def build_chunks(settings: Settings, config: Any, state: Any, layout: Layout) -> list[Any]:
    """The GPTModel of this process; several, with ``layout.vpp``. Their weights are not set yet."""
    specs = package.part("models.gpt.gpt_layer_specs")
    gpt = package.part("models.gpt.gpt_model")
    has_engine = package.has_transformer_engine() and not config.use_cpu_initialization
    chunks = []
    for stage in range(layout.vpp):
        number = stage if layout.vpp > 1 else None
        spec = specs.get_gpt_decoder_block_spec(config, use_transformer_engine=has_engine, vp_stage=number)
        if layout.computes_parts:
            use_part_attention(spec)
        chunk = gpt.GPTModel(
            config,
            spec,
            **settings.model,
            pre_process=state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
            post_process=state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
            vp_stage=number,
        )
        if layout.computes_parts:
            use_part_positions(chunk)
        chunks.append(chunk)
    return chunks
