"""Megatron-Core behind the contract of a strategy: its model, its schedules, an optimizer of torch on each process's shards."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from swift.errors import CheckpointError, ConfigError, ModelError, TrainingError
from swift.files import save_torch
from swift.model.batch import Batch
from swift.model.policy import evaluating, is_close, probe_ids
from swift.objectives.base import Objective
from swift.parallel.base import Sums
from swift.parallel.megatron.arguments import check_fields
from swift.parallel.megatron.bridge import Bridge
from swift.parallel.megatron.cpu import on_cpu
from swift.parallel.megatron.gradients import gradient_norm, scale_gradients, sum_gradients
from swift.parallel.megatron.model import Layout, build_chunks, join_groups, transformer_config
from swift.parallel.megatron.names import plan
from swift.parallel.megatron.policy import MegatronPolicy
from swift.parallel.megatron.settings import read_settings
from swift.parallel.world import add


class Megatron:
    """Tensor, pipeline (1F1B and interleaved), expert and data parallel by Megatron-Core.

    ``transformer`` are fields of its TransformerConfig that the user has set, such as recompute_granularity.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        layout: Layout,
        divisible_by: int = 128,
        transformer: dict[str, Any] | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        if autocast_dtype is not None:
            raise ConfigError(
                "--strategy megatron computes in the precision of the weights", hint="say --torch_dtype bfloat16 or --torch_dtype float32"
            )
        self.device, self.layout, self.divisible_by, self.extra = device, layout, divisible_by, transformer or {}

    def prepare(self, model: Any, make_optimizer: Callable[[Any], Optimizer]) -> tuple[Any, Optimizer]:
        """Megatron's chunks with the weights of ``model``, a whole transformers model, which may be let go of afterwards.

        Raises ModelError if they do not compute the logits that ``model`` computes.
        """
        config, state_dict = model.config.get_text_config(), model.state_dict()
        tied = bool(config.tie_word_embeddings)
        entries = plan(state_dict, num_experts=getattr(config, "num_local_experts", None) or 0, is_tied=tied)
        self.settings = read_settings(config.to_dict(), entries, tp=self.layout.tp, divisible_by=self.divisible_by)
        self.layout.check(self.settings, dist.get_world_size())
        if frozen := [name for name, parameter in model.named_parameters() if not parameter.requires_grad]:
            raise ConfigError(f"--strategy megatron trains all weights, and {frozen[0]} is frozen", hint="say --tuner_type full")
        self.groups = join_groups(self.layout)
        check_fields(self.extra, self.settings.transformer)
        dtype = next(model.parameters()).dtype
        with on_cpu():
            self.config = transformer_config(self.settings, self.layout, device=self.device, dtype=dtype, extra=self.extra)
            if self.device.type == "cuda":
                from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

                model_parallel_cuda_manual_seed(torch.initial_seed() % 2**31)
            chunks = build_chunks(self.settings, self.config, self.groups, self.layout)
        self.model = nn.ModuleList(chunks).to(self.device)
        self.bridge = Bridge(chunks, entries, self.settings.dims, self.groups)
        self.bridge.load(state_dict.__getitem__)
        self._compare(model)
        self.optimizer = make_optimizer(self.model)
        return self.model, self.optimizer

    def policy(self, model: Any) -> MegatronPolicy:
        """The policy of ``model``, which ``prepare`` gave."""
        group = self.groups.get_tensor_model_parallel_group()
        self._policy = MegatronPolicy(model, group, self.settings.dims.vocab_size, self._evaluate)
        return self._policy

    def autocast(self) -> Any:
        return contextlib.nullcontext()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def add(self, values: Sequence[float]) -> list[float]:
        return add(values, self.device, self.groups.get_data_parallel_group())

    def accumulate(self, policy: Any, objective: Objective, reference: Any, batches: Sequence[Batch], count: float) -> Sums:
        if reference is not None:
            raise ConfigError("--strategy megatron has no reference model yet", hint="use --strategy fsdp2")
        return self._run(policy, objective, batches, count)

    def clip_and_step(self, max_grad_norm: float) -> tuple[float, bool]:
        sum_gradients(self.model, self.groups)
        norm = gradient_norm(self.model, self.groups)
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient norm is {norm}")
        if 0 < max_grad_norm < norm:
            scale_gradients(self.model, max_grad_norm / (norm + 1e-6))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, True

    def whole(self, model: Any, *, only: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
        """Hugging Face's tensors, in the main process; a head that is the embedding is left out, as transformers has it."""
        return {name: tensor for name, tensor in self.bridge.gather() if only is None or only(name)}

    def save(self, path: Path) -> None:
        """One file for each process: its optimizer's state, and which part of which layout it belongs to."""
        save_torch(self._own(path), {"optimizer": self.optimizer.state_dict(), "layout": self._place()})

    def load(self, path: Path) -> None:
        own = self._own(path)
        try:
            state = torch.load(own, map_location=self.device, weights_only=True)
            if state["layout"] != self._place():
                raise CheckpointError(f"{own} was saved by {state['layout']}, and this process is {self._place()}", hint="resume as before")
            self.optimizer.load_state_dict(state["optimizer"])
        except (OSError, KeyError, ValueError, RuntimeError) as problem:
            raise CheckpointError(f"{own}: the optimizer state cannot be read: {str(problem).splitlines()[0]}") from None

    def _own(self, path: Path) -> Path:
        return path.with_name(f"{path.stem}-{dist.get_rank()}-of-{dist.get_world_size()}{path.suffix}")

    def _place(self) -> dict[str, int]:
        return {**vars(self.layout), "rank": dist.get_rank(), "world_size": dist.get_world_size()}

    def _run(self, policy: MegatronPolicy, objective: Objective, batches: Sequence[Batch], count: float, *, learns: bool = True) -> Sums:
        """One step's batches through Megatron's schedule; the sums of the last stage, in all stages."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward(iterator: Iterator[Batch], chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            batch = next(iterator).to(self.device)

            def loss(logits_BTP: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, dict[str, Tensor]]]:
                with policy.with_logits(logits_BTP):
                    total, metrics = objective.loss_sum(policy, None, batch)
                return total / max(count, 1.0), torch.zeros((), dtype=torch.int), (total.detach(), metrics)

            return chunk(batch.input_ids, _positions(batch), None), loss

        batches = self._ready(batches)
        with on_cpu():
            found = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=[iter(batches) for _ in self.model] if len(self.model) > 1 else iter(batches),
                model=list(self.model),
                num_microbatches=len(batches),
                seq_length=batches[0].input_ids.shape[1],
                micro_batch_size=batches[0].input_ids.shape[0],
                forward_only=not learns,
            )
        sums = Sums()
        for total, metrics in found:
            sums.add(total, metrics)
        return self._from_last_stage(sums)

    def _from_last_stage(self, sums: Sums) -> Sums:
        if self.layout.pp == 1:
            return sums
        box = [(float(sums.loss), {name: float(value) for name, value in sums.metrics.items()})]
        group = self.groups.get_pipeline_model_parallel_group()
        dist.broadcast_object_list(box, src=self.groups.get_pipeline_model_parallel_last_rank(), group=group)
        sums.loss, sums.metrics = box[0][0], dict(box[0][1])
        return sums

    def _ready(self, batches: Sequence[Batch]) -> list[Batch]:
        """Padded batches only; an interleaved pipeline gets as many as its stages divide, the last ones without weight."""
        for batch in batches:
            if batch.layout is not None:
                raise ConfigError("--strategy megatron takes padded rows", hint="say --padding_free false")
            if batch.attention_mask is not None and bool((batch.attention_mask.diff(dim=1) > 0).any()):
                raise ConfigError("--strategy megatron takes rows that are padded on the right", hint="say --padding_side right")
        if getattr(self.config, "moe_token_dispatcher_type", "") == "allgather" and "num_moe_experts" in self.settings.transformer:
            shape = torch.tensor([max(batch.input_ids.shape[axis] for batch in batches) for axis in (0, 1)], device=self.device)
            dist.all_reduce(shape, dist.ReduceOp.MAX)
            batches = [_widened(batch, *shape.tolist()) for batch in batches]
        missing = -len(batches) % self.layout.pp if self.layout.vpp > 1 else 0
        filler = replace(batches[-1], weight_S=torch.zeros_like(batches[-1].weight_S))
        return [*batches, *[filler] * missing]

    def _evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The policy's answer outside of a step: one forward pass through all stages."""
        sums = self._run(self._policy, _CrossEntropy(), [batch], 1.0, learns=False)
        return torch.as_tensor(sums.loss), torch.as_tensor(sums.metrics["right"])

    @torch.no_grad()
    def _compare(self, model: Any) -> None:
        """ModelError unless Megatron's chunks give the log-probabilities that transformers gives, on a few tokens."""
        with evaluating(model), evaluating(self.model):
            ids = probe_ids(model, min(8, self.settings.dims.vocab_size))
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            places = torch.arange(ids.shape[1] - 1, device=ids.device)
            wanted = logits[:-1].log_softmax(dim=1)[places, ids[0, 1:]]
            batch = Batch(
                input_ids=ids,
                kept_K=places,
                row_S=places,
                target_S=ids[0, 1:],
                weight_S=torch.ones(len(places), device=ids.device),
                document_S=torch.zeros_like(places),
                num_documents=1,
                num_tokens=ids.shape[1],
            )
            policy = self.policy(self.model)
            found = []
            for place in range(len(places)):
                weight = torch.zeros(len(places), device=ids.device)
                weight[place] = -1.0
                found.append(policy.cross_entropy(replace(batch, weight_S=weight))[0].float())
        if not is_close(torch.stack(found).to(wanted), wanted):
            difference = float((torch.stack(found).to(wanted) - wanted).abs().max())
            raise ModelError(
                f"Megatron-Core's GPTModel computes something else than transformers: log-probabilities differ by {difference:.2g}",
                hint="train it by --strategy fsdp2",
            )


class _CrossEntropy:
    """What the policy itself asks for."""

    layout, needs_reference = "sft", False

    def count(self, batch: Any) -> float:
        return 1.0

    def loss_sum(self, policy: Any, reference: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, right = policy.cross_entropy(batch)
        return loss, {"right": right}


def _positions(batch: Batch) -> Tensor:
    return torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device).expand_as(batch.input_ids)


def _widened(batch: Batch, rows: int, width: int) -> Batch:
    """``batch`` with padding up to ``rows`` rows of ``width`` tokens."""
    height, length = batch.input_ids.shape
    ids = nn.functional.pad(batch.input_ids, (0, width - length, 0, rows - height))
    return replace(batch, input_ids=ids, attention_mask=None, kept_K=batch.kept_K // length * width + batch.kept_K % length)
