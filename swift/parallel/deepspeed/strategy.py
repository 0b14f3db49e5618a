"""The strategy that leaves gradients, optimizer and sharding to DeepSpeed."""

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from swift.config.commands import SftConfig
from swift.errors import ConfigError, DependencyError, TrainingError, first_line
from swift.model.batch import Batch
from swift.model.device import choose_device
from swift.objectives.base import Objective
from swift.parallel.base import Sums, accumulate, evaluate
from swift.parallel.deepspeed import checkpoint, package, schema, settings
from swift.parallel.deepspeed.entry import Entry
from swift.parallel.mesh import Mesh, Sizes, sizes_of
from swift.parallel.sequence import Share, in_parts, make_share, use_sequence_parallel
from swift.parallel.world import World, add


class DeepSpeed:
    """Training by DeepSpeed's engine. A step is cut by our loop, and its gradients are sums over all processes.

    Forward passes go through ``call``, backward passes through ``backward``: DeepSpeed wants to see both. The learning rate
    is set by our schedule, in the groups of the optimizer inside DeepSpeed's.
    """

    shards = True  # true of ZeRO-3; the other stages go the same way, since no backward pass may go past the engine

    @staticmethod
    def check(config: SftConfig, sizes: Sizes) -> None:
        """ConfigError for settings that are unknown or contradict an option, DependencyError without the package.

        Options that were left open take what the file says. Nothing is loaded yet.
        """
        if config.deepspeed is None:
            raise ConfigError("--strategy deepspeed needs settings", hint="say --deepspeed zero2 instead, or a JSON file")
        name = settings.title(config.deepspeed)
        if sizes != Sizes(dp=sizes.dp, cp=sizes.cp):
            raise ConfigError(f"{name} and {sizes} cannot be combined: its processes have all layers", hint="use --fsdp fsdp2")
        found = settings.read(config.deepspeed)
        settings.agree(found, config, sizes.dp)
        package.load(choose_device(config.device).type)
        if config.fp16:
            _check_float16(name)
        schema.check(settings.fill(found, config, sizes.dp, width=1024, dtype=None), name)
        parts = ("offload_optimizer", "offload_param")
        if "nvme" in [settings.value_at(found, f"zero_optimization.{part}.device") for part in parts] and not package.reads_disks():
            raise DependencyError(f"{name}: offload to nvme needs libaio, which is not installed", hint="apt install libaio-dev")

    def __init__(self, config: SftConfig, world: World, device: torch.device, autocast_dtype: torch.dtype | None = None) -> None:
        self.config, self.world, self.device, self.dtype = config, world, device, autocast_dtype
        self.package = package.load(device.type)
        assert config.deepspeed is not None
        self.settings = settings.read(config.deepspeed)
        self.stage = settings.stage(self.settings)
        self.is_float16 = autocast_dtype == torch.float16
        if self.is_float16:
            _check_float16(settings.title(config.deepspeed))
        self._left = 0
        self.share: Share | None = None  # of the processes that share a sequence; to DeepSpeed they are some that see other tokens
        self._readers: Any = None

    def prepare(self, model: Any, make_optimizer: Callable[[Any], Optimizer]) -> tuple[Any, Optimizer]:
        name = settings.title(self.config.deepspeed)
        trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        if self.dtype is None and trained - {torch.float32}:
            raise ConfigError(f"{name}: bf16.enabled false and weights in {_names(trained)} cannot be combined", hint='write "auto" there')
        self.model = model
        text = getattr(model.config, "get_text_config", lambda: model.config)()
        dtype = None if self.dtype is None else _names({self.dtype})
        filled = settings.fill(self.settings, self.config, self.world.size, width=getattr(text, "hidden_size", None), dtype=dtype)
        if not dist.is_initialized():
            backend = dist.get_default_backend_for_device(self.device)
            dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
        # DeepSpeed reads it, also of a process that is alone and that no launcher started.
        os.environ.setdefault("LOCAL_RANK", str(self.world.local_rank))
        self._share_sequences(model)
        optimizer = make_optimizer(model)
        if self.stage == 3 and not self.world.is_alone:
            self._cut(filled)
        entry = Entry(model)
        # DeepSpeed's own optimizer, if the file names one, has our groups: no decay for biases and norms.
        is_own = "optimizer" in filled
        given = {"model_parameters": _groups(optimizer)} if is_own else {"optimizer": optimizer}
        try:
            with _quiet():
                self.engine = self.package.initialize(model=entry, config=filled, dist_init_required=False, **given)[0]
        except TypeError as problem:
            if not is_own or "argument" not in str(problem):
                raise
            raise ConfigError(f"{name}: optimizer.params does not fit: {first_line(problem)}") from None
        except (AssertionError, NotImplementedError, ValueError) as problem:
            # What it does not take together, or not of this model, it finds out by these; it has no error class of its own.
            if not package.has_raised(problem):
                raise
            raise ConfigError(f"{name}: DeepSpeed refuses it: {first_line(problem)}") from problem
        self._forget_trial_step()
        self._register_head(entry)
        self.averages = settings.value_at(filled, "gradient_allreduce_op") != "sum"
        own: Optimizer = self.engine.basic_optimizer
        return model, own

    def _share_sequences(self, model: Any) -> None:
        size = self.config.sequence_parallel_size
        if size == 1:
            return
        mesh = Mesh(sizes_of(self.world.size, cp=size), self.device.type)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.share, self._readers = make_share(inner.config, mesh.group("cp"), self.config.sequence_parallel_kind), mesh.group("dp")
        use_sequence_parallel(inner, self.share)

    def _forget_trial_step(self) -> None:
        """Stage 0 in 16 bits: DeepSpeed 0.19.8 makes the optimizer's state by a step of zero gradients.

        That step counts in the bias correction of Adam (the first update would be a quarter too small), and decays weights.
        """
        optimizer, own = self.engine.optimizer, self.engine.basic_optimizer
        if self.stage or not hasattr(optimizer, "fp16_groups"):
            return
        own.state.clear()
        for group in own.param_groups:
            group.pop("step", None)  # where FusedAdam counts
        if hasattr(optimizer, "fp32_groups_flat"):
            pairs = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups_flat, strict=True)
        else:
            flat = itertools.chain.from_iterable
            pairs = zip(flat(optimizer.fp32_groups), flat(optimizer.fp16_groups), strict=True)
        for kept, used in pairs:
            kept.data.copy_(used.data)

    def _cut(self, filled: dict[str, Any]) -> None:
        """Leave this process's part of each parameter, one after the other, in the precision of the computation.

        DeepSpeed casts all of them before it cuts the first, and on a CPU writes what the first process has into the others'
        whole ones: pages of a file that are written to are memory until all of the file is let go.
        """
        self.package.init_distributed(dist_init_required=False)
        first: Any = None
        for parameter in self.model.parameters():
            dtype = self.dtype if parameter.is_floating_point() and self.dtype is not None else parameter.dtype
            parameter.data = parameter.data.to(dtype, copy=True)
            if first is None:
                first = parameter
                with _quiet():
                    self.package.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=filled, dtype=dtype)
            else:
                first.convert_to_zero_parameters(param_list=[parameter])

    def _register_head(self, entry: Entry) -> None:
        """Tell ZeRO-3 of weights that are used outside of their modules: our losses multiply by the head's themselves."""
        if self.stage < 3:
            return
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        head = inner.get_output_embeddings()
        for parameter in head.parameters() if head is not None else ():
            self.package.zero.register_external_parameter(entry, parameter)

    def autocast(self) -> Any:
        return contextlib.nullcontext()  # DeepSpeed holds the weights in the precision of the computation

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.engine(function, *arguments)[0]

    def add(self, values: Sequence[float]) -> list[float]:
        return list(values) if self.world.is_alone else add(values, self.device, self._readers)

    def accumulate(self, policy: Any, objective: Objective, reference: Any, batches: Sequence[Batch], count: float) -> Sums:
        assert all(batch.root_ids is None for batch in batches)  # its backward pass would go past the engine
        self._left = len(batches)
        reference, policy = in_parts(reference, self.share, policy), in_parts(policy, self.share)
        return accumulate(self, policy, objective, reference, batches, count, self.device)

    def evaluate(self, policy: Any, objective: Objective, reference: Any, batches: Sequence[Batch]) -> Sums:
        return evaluate(self, in_parts(policy, self.share), objective, in_parts(reference, self.share, policy), batches, self.device)

    def backward(self, loss: Tensor) -> None:
        self._left -= 1
        self.engine.set_gradient_accumulation_boundary(self._left == 0)
        # DeepSpeed averages over the processes, whatever it divides before and after; ours is a sum.
        self.engine.backward(loss * self.world.size if self.averages else loss, scale_wrt_gas=False)

    def clip_and_step(self, max_grad_norm: float) -> tuple[float, bool]:
        assert max_grad_norm == self.config.max_grad_norm  # DeepSpeed clips
        norm = self._norm() if self.stage == 0 else None
        try:
            self.engine.step()
        except Exception as problem:  # nothing narrower is raised when the loss scale cannot fall further
            if "loss scale" not in str(problem):
                raise
            raise TrainingError("the gradients overflow float16 at every loss scale") from problem
        was_applied = bool(self.engine.was_step_applied())
        if norm is None:
            norm = float(self.engine.get_global_grad_norm()) if was_applied else math.inf
        if not math.isfinite(norm) and not self.is_float16:
            raise TrainingError(f"the gradient norm is {norm}")
        return norm, was_applied

    def _norm(self) -> float:
        """Stage 0: DeepSpeed has added the gradients up, and keeps no norm of them."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        scale = float(getattr(self.engine.optimizer, "loss_scale", 1.0))
        return float(torch.nn.utils.get_total_norm([gradient.float() for gradient in gradients])) / scale

    def whole(self, model: Any, *, only: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        first: dict[int, str] = {}  # a tied weight is gathered once, and stays one tensor
        for name, tensor in model.state_dict(keep_vars=True).items():
            if only is not None and not only(name):
                continue
            same = first.setdefault(id(tensor), name)
            is_split = hasattr(tensor, "ds_id")
            with self.package.zero.GatheredParameters([tensor]) if is_split and same == name else contextlib.nullcontext():
                if self.world.is_main and same == name:
                    assert not is_split or tensor.numel() == tensor.ds_numel, f"{name} was not gathered"
                    found[name] = tensor.detach().cpu().clone()
                elif self.world.is_main:
                    found[name] = found[same]
        return found

    def local_bytes(self) -> dict[str, int]:
        """Bytes of weights and of optimizer state that this process holds between steps."""
        weights = [getattr(parameter, "ds_tensor", parameter) for parameter in self.model.parameters()]
        states = [value for own in self.engine.basic_optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]
        return {"weights": _bytes(weights), "optimizer": _bytes(states)}

    def save(self, path: Path, *, in_background: bool = False) -> None:
        with _quiet():
            checkpoint.save(path.parent, self.engine, self.model, self.world)

    def load(self, path: Path) -> None:
        with _quiet():
            checkpoint.load(path.parent, self.engine, self.model, self.world)


def _check_float16(name: str) -> None:
    if not package.part("deepspeed.accelerator").get_accelerator().is_fp16_supported():
        raise ConfigError(f"--fp16 and {name} cannot be combined: DeepSpeed has no float16 on this device", hint="use --bf16")


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: group[key] for key in ("params", "lr", "weight_decay") if key in group} for group in optimizer.param_groups]


def _quiet() -> Any:
    """What DeepSpeed warns of while it sets up, saves and loads is for its authors."""
    return warnings.catch_warnings(action="ignore")
