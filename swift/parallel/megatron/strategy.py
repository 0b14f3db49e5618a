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
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from swift.config.commands import SftConfig
from swift.errors import ConfigError, ModelError, TrainingError
from swift.model.batch import Batch
from swift.model.policy import evaluating, is_close
from swift.objectives.base import Objective
from swift.parallel.base import Sums
from swift.parallel.megatron import checkpoint, package
from swift.parallel.megatron.arguments import check_fields
from swift.parallel.megatron.before import Before
from swift.parallel.megatron.bridge import Bridge
from swift.parallel.megatron.context import compute_part, filled
from swift.parallel.megatron.cpu import on_cpu
from swift.parallel.megatron.describe import describe
from swift.parallel.megatron.gradients import gradient_norm, scale_gradients, sum_gradients
from swift.parallel.megatron.holder import Holder
from swift.parallel.megatron.lora import plan_adapters, put, read, trial_values, without_adapters
from swift.parallel.megatron.model import Layout, build_chunks, join_groups, transformer_config
from swift.parallel.megatron.policy import MegatronPolicy
from swift.parallel.megatron.probe import probe
from swift.parallel.megatron.refuse import refuse
from swift.parallel.mesh import Sizes
from swift.parallel.pipeline.run import warn_of_idle
from swift.parallel.sequence import PartPolicy, make_share, split
from swift.parallel.world import World, add


class Megatron:
    """Tensor, pipeline (1F1B and interleaved), expert and data parallel by Megatron-Core; our attention over flat rows and their parts."""

    shards = True

    @staticmethod
    def check(config: SftConfig, sizes: Sizes) -> None:
        """ConfigError for what does not go with Megatron-Core, DependencyError without the package. Nothing is loaded yet."""
        refuse(config, sizes)
        package.part("parallel_state")
        check_fields(config.transformer_fields(recompute_all=False))

    def __init__(
        self, config: SftConfig, world: World, device: torch.device, autocast_dtype: torch.dtype | None = None, *, is_flat: bool = False
    ) -> None:
        """``is_flat``: all batches are rows of documents without padding."""
        self.config, self.world, self.device, self.dtype = config, world, device, autocast_dtype
        virtual = config.virtual_pipeline_model_parallel_size
        self.layout = Layout(
            tp=config.tensor_model_parallel_size,
            pp=config.pipeline_model_parallel_size,
            cp=config.sequence_parallel_size,
            ep=config.expert_model_parallel_size,
            vpp=virtual,
            shares_tokens=config.sequence_parallel,
            is_flat=is_flat,
        )
        self._has_warned = False
        package.quiet_logs()

    def prepare(self, model: Any, make_optimizer: Callable[[Any], Optimizer]) -> tuple[Any, Optimizer]:
        """Megatron's chunks with the weights of ``model``, a whole transformers model, which keeps none of them.

        Raises ModelError if they do not compute the logits that ``model`` computes.
        """
        source = read(model)
        if self.dtype is not None and source.dtypes != {self.dtype}:
            raise ConfigError(
                "--strategy megatron computes in the precision of the weights", hint="say --torch_dtype bfloat16 or --torch_dtype float32"
            )
        self.settings, entries = describe(source.model, source.names, tp=self.layout.tp)
        added = plan_adapters(source.adapters, entries)
        self.layout.check(self.settings, self.world.size)
        timeout = max(1, self.config.ddp_timeout // 60)
        self.groups = join_groups(self.layout, self.device, timeout_minutes=timeout)
        self.share = None
        if self.layout.cp > 1:
            group = self.groups.get_context_parallel_group()
            self.share = make_share(model.config, group, self.config.sequence_parallel_kind, tp=self.layout.tp)
        fields = self.config.transformer_fields(recompute_all=bool(self.config.gradient_checkpointing))
        check_fields(fields, self.settings.transformer)
        with on_cpu(), package.quiet():
            self.transformer = transformer_config(
                self.settings, self.layout, device=self.device, dtype=next(iter(source.dtypes)), extra=fields
            )
            if self.device.type == "cuda":
                package.part("tensor_parallel").model_parallel_cuda_manual_seed(torch.initial_seed() % 2**31)
            chunks = build_chunks(self.settings, self.transformer, self.groups, self.layout)
        self.model = Holder(chunks, source.model, model if added else None)
        self.model.to(self.device, self.transformer.params_dtype)  # torch's norms are made in float32
        if added:
            put(chunks, source, entries, self.settings.dims, self.groups, shares_tokens=self.layout.shares_tokens)
        self.bridge = Bridge(chunks, [*entries, *added], self.settings.dims, self.groups)
        self.split = self.bridge.split()
        self.bridge.load(source.tensors.__getitem__)
        self._policy = MegatronPolicy(self.model, self.groups.get_tensor_model_parallel_group(), self.settings.dims.vocab_size, self._alone)
        with trial_values(source, self.bridge):
            self._compare(model)
        del source
        model.to("meta")
        self.mesh = DeviceMesh.from_group(self.groups.get_tensor_model_parallel_group(), self.device.type)
        self.optimizer = make_optimizer(self.model)
        _decay_matrices(self.optimizer)
        return self.model, self.optimizer

    def make_policy(self, model: Any) -> MegatronPolicy:
        """The policy of what ``prepare`` gave."""
        assert model is self.model
        return self._policy

    def autocast(self) -> Any:
        return contextlib.nullcontext()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def add(self, values: Sequence[float]) -> list[float]:
        return add(values, self.device, self.groups.get_data_parallel_group())

    def accumulate(self, policy: Any, objective: Objective, reference: Any, batches: Sequence[Batch], count: float) -> Sums:
        if len(batches) < self.layout.pp and not self._has_warned:
            self._has_warned = True
            warn_of_idle(self.layout.pp, self.layout.vpp, len(batches))
        return self._run(policy, objective, reference, batches, count)

    def evaluate(self, policy: Any, objective: Objective, reference: Any, batches: Sequence[Batch]) -> Sums:
        with torch.no_grad():
            return self._run(policy, objective, reference, batches, 1.0, learns=False)

    def clip_and_step(self, max_grad_norm: float) -> tuple[float, bool]:
        sum_gradients(self.model, self.groups)
        norm = gradient_norm(self.model, self.groups, self.split)
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient norm is {norm}")
        if 0 < max_grad_norm < norm:
            scale_gradients(self.model, max_grad_norm / (norm + 1e-6))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, True

    def whole(self, model: Any, *, only: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
        """Hugging Face's tensors, in the main process; a head that is the embedding is left out, as transformers has it.

        Those of an adapter have the names that PEFT's model gives them.
        """
        return dict(self.bridge.gather(only=only))

    def local_bytes(self) -> dict[str, int]:
        """Bytes of weights and of optimizer state that this process holds."""
        states = [value for own in self.optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]
        return {"weights": checkpoint.bytes_of(list(self.model.parameters())), "optimizer": checkpoint.bytes_of(states)}

    def save(self, path: Path, *, in_background: bool = False) -> None:
        checkpoint.save(path, self.bridge, self.optimizer, self.mesh)

    def load(self, path: Path) -> None:
        checkpoint.load(path, self.bridge, self.optimizer, self.mesh)

    def _run(
        self, policy: MegatronPolicy, objective: Objective, reference: Any, batches: Sequence[Batch], count: float, *, learns: bool = True
    ) -> Sums:
        """One step's batches through Megatron's schedule; the sums of the last stage, in all stages."""
        schedules = package.part("pipeline_parallel")

        share = self.share
        seen = policy if share is None else PartPolicy(policy, share)

        def forward(iterator: Iterator[tuple[Batch, Batch]], chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            batch, part = (one.to(self.device) for one in next(iterator))

            def loss(logits_BTP: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, dict[str, Tensor]]]:
                with policy.with_logits(logits_BTP):
                    total, metrics = objective.loss_sum(seen, reference, batch)
                return total / max(count, 1.0), torch.zeros((), dtype=torch.int), (total.detach(), metrics)

            return compute_part(chunk, part) if part.layout is not None else chunk(part.input_ids, _positions(part), None), loss

        if isinstance(reference, Before):
            with torch.no_grad(), evaluating(self.model), without_adapters(self.model):
                batches = reference.put(batches, lambda objective: self._run(policy, objective, None, batches, 1.0, learns=False))
        batches = self._ready(batches)
        parts = [(batch, batch if share is None else split(batch, share)) for batch in batches]
        rows, width = parts[0][1].input_ids.shape
        chunks = list(self.model.chunks)
        with on_cpu():
            found = schedules.get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=[iter(parts) for _ in chunks] if len(chunks) > 1 else iter(parts),
                model=chunks,
                num_microbatches=len(batches),
                seq_length=width * self.layout.cp,
                micro_batch_size=rows,
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
        """Batches of lengths that the processes can share; an interleaved pipeline gets as many as its stages divide.

        The last ones are without weight then. The dispatcher of experts that runs on a CPU wants one shape in all processes.
        """
        assert all((batch.layout is not None) == self.layout.is_flat and batch.root_ids is None for batch in batches)
        shapes = [tuple(batch.input_ids.shape) for batch in batches]
        if self.layout.vpp > 1 or self._has_one_shape:
            shape = torch.tensor([max(sizes) for sizes in zip(*shapes, strict=True)], device=self.device)
            if self._has_one_shape:
                dist.all_reduce(shape, dist.ReduceOp.MAX)
            shapes = [(int(shape[0]), int(shape[1]))] * len(batches)
        step = self.layout.tp if self.layout.shares_tokens else 1
        is_padded = self.layout.cp > 1 and (self.layout.vpp > 1 or self._has_one_shape or step > 1)
        if is_padded:  # parts of rows divide too, without filling, and padding is a part of the row
            step *= 2 * self.layout.cp
            batches = [replace(batch, attention_mask=None) for batch in batches]
        batches = [_widened(batch, rows, -(-width // step) * step) for batch, (rows, width) in zip(batches, shapes, strict=True)]
        missing = -len(batches) % self.layout.pp if self.layout.vpp > 1 else 0
        filler = replace(batches[-1], weight_S=torch.zeros_like(batches[-1].weight_S))
        return [*batches, *[filler] * missing]

    @property
    def _has_one_shape(self) -> bool:
        return "num_moe_experts" in self.settings.transformer and self.transformer.moe_token_dispatcher_type == "allgather"

    def _alone(self, batch: Batch) -> Tensor:
        """(num_documents,) the log-probabilities of the documents of ``batch``, outside of a step."""
        found = torch.zeros(batch.num_documents, device=self.device)

        class Each:
            """An objective that keeps them."""

            def loss_sum(self, policy: Any, reference: Any, given: Batch) -> tuple[Tensor, dict[str, Tensor]]:
                found.add_(policy.logps(given))  # those that fill a schedule have no weight
                return found.sum(), {}

        self._run(self._policy, Each(), None, [batch], 1.0, learns=False)  # type: ignore[arg-type]
        if self.layout.pp > 1:
            group = self.groups.get_pipeline_model_parallel_group()
            dist.broadcast(found, src=self.groups.get_pipeline_model_parallel_last_rank(), group=group)
        return found

    @torch.no_grad()
    def _compare(self, model: Any) -> None:
        """ModelError, in every process, unless Megatron's chunks give the log-probabilities that transformers gives."""
        with evaluating(model), evaluating(self.model):
            batch, wanted = probe(model, is_flat=self.layout.is_flat)
            found = self._alone(batch.to(self.device)).to(wanted)
        dtype = self.transformer.params_dtype
        if not is_close(found.to(dtype), wanted.to(dtype)):
            difference = float((found - wanted).abs().max())
            raise ModelError(
                f"Megatron-Core's GPTModel computes something else than transformers: log-probabilities differ by {difference:.2g}",
                hint="train it by --strategy fsdp2",
            )


def _decay_matrices(optimizer: Optimizer) -> None:
    """Move matrices that lie in a module together with a norm, as Transformer Engine has them, to the group of matrices."""
    decayed = next((group for group in optimizer.param_groups if group.get("weight_decay")), None)
    if decayed is None:
        return
    for group in optimizer.param_groups:
        if group is not decayed and not group.get("weight_decay"):
            matrices = [parameter for parameter in group["params"] if parameter.dim() > 1]
            group["params"] = [parameter for parameter in group["params"] if parameter.dim() <= 1]
            decayed["params"].extend(matrices)


def _positions(batch: Batch) -> Tensor:
    return torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device).expand_as(batch.input_ids)


def _widened(batch: Batch, rows: int, width: int) -> Batch:
    """``batch`` with padding up to ``rows`` rows of ``width`` tokens; a flat row with filling."""
    height, length = batch.input_ids.shape
    if batch.layout is not None:
        return filled(batch, width)
    if (height, length) == (rows, width):
        return batch
    ids = nn.functional.pad(batch.input_ids, (0, width - length, 0, rows - height))
    return replace(batch, input_ids=ids, attention_mask=None, kept_K=batch.kept_K // length * width + batch.kept_K % length)
