"""Weights between Hugging Face's names and the parameters of this process, tensor by tensor."""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from swift.errors import ModelError
from swift.parallel.megatron.layout import Dims
from swift.parallel.megatron.names import STACKED, Entry, by_name, first_layer, global_name, read


class Bridge:
    """What this process has of a model, under the names that count from the model's first layer and expert."""

    def __init__(self, chunks: Sequence[Any], entries: Sequence[Entry], dims: Dims, state: Any) -> None:
        self.entries, self.dims = list(entries), dims
        self.rank, self.size = state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()
        known = by_name(entries)
        self.parameters: dict[str, tuple[torch.nn.Parameter, Entry]] = {}
        self.copies: list[tuple[torch.nn.Parameter, Entry]] = []  # the last stage's own copy of a tied embedding
        for chunk in chunks:
            first = first_layer(chunk)
            for name, parameter in chunk.named_parameters():
                expert = state.get_expert_model_parallel_rank() * _experts_here(chunk.config)
                whole = global_name(name, first_layer=first, first_expert=expert)
                if whole == "output_layer.weight" and whole not in known:
                    self.copies.append((parameter, known["embedding.word_embeddings.weight"]))
                    continue
                if whole not in known:
                    raise ModelError(f"the checkpoint has nothing for Megatron-Core's parameter {whole}")
                self.parameters[whole] = (parameter, known[whole])

    def held(self) -> Iterator[tuple[torch.nn.Parameter, str, Entry]]:
        """(parameter, its name in the whole model, whatever the layers are called here; what it is made of), copies too."""
        for parameter, entry in [*self.parameters.values(), *self.copies]:
            yield parameter, entry.mcore[0], entry

    def trained(self) -> Iterator[tuple[torch.nn.Parameter, str, Entry]]:
        """Those of ``held`` that are not frozen."""
        return (one for one in self.held() if one[0].requires_grad)

    def split(self) -> set[torch.nn.Parameter]:
        """The parameters of which each process of a tensor parallel group has other numbers.

        Megatron-Core says so too, but for weights that it has not initialized itself.
        """
        return {parameter for parameter, _, entry in self.held() if entry.operation.splits}

    @torch.no_grad()
    def load(self, source: Callable[[str], Tensor], *, only: Container[str] | None = None) -> None:
        """Fill every parameter of this process from ``source``, which gives whole tensors by Hugging Face's names.

        With ``only``, those that are made of tensors of these names.
        """
        for parameter, entry in [*self.parameters.values(), *self.copies]:
            if only is not None and entry.hf[0] not in only:
                continue
            shard = entry.to_mcore([read(source, name) for name in entry.hf], self.dims, rank=self.rank, size=self.size)
            if shard.shape != parameter.shape:
                raise ModelError(f"{entry.hf[0]} becomes {tuple(shard.shape)}, and Megatron-Core has {tuple(parameter.shape)}")
            parameter.copy_(shard)

    def gather(
        self, value: Callable[[torch.nn.Parameter], Tensor] = torch.nn.Parameter.detach, *, only: Callable[[str], bool] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face's name, whole tensor on the CPU), one after the other, in the main process; nothing elsewhere.

        ``value`` says what of a parameter: itself, or its gradient; ``only``, by its names, which are not asked for at all.
        Every process must go through to the end.
        """
        own = {name: (self.rank, tuple(parameter.shape), parameter.dtype) for name, (parameter, _) in self.parameters.items()}
        holders: list[Any] = [own]
        if dist.is_initialized():
            holders = [None] * dist.get_world_size()
            dist.all_gather_object(holders, own)
        where: dict[tuple[str, int], Any] = {}
        for rank, names in reversed(list(enumerate(holders))):
            where |= {(name, part): (rank, shape, dtype) for name, (part, shape, dtype) in names.items()}
        stack: list[Tensor] = []
        for entry in self.entries:
            if only is not None and not any(only(STACKED.sub(r"\1", name)) for name in entry.hf):
                continue
            shards = self._collect(entry, where, value)
            if shards is None:
                continue
            for name, tensor in zip(entry.hf, entry.to_hf(shards, self.dims), strict=True):
                match = STACKED.fullmatch(name)
                if match is None:
                    yield name, tensor
                    continue
                stack.append(tensor)
                if len(stack) == self._height(match[1]):
                    yield match[1], torch.stack(stack)
                    stack = []

    def _collect(self, entry: Entry, where: dict[tuple[str, int], Any], value: Callable[[Any], Tensor]) -> list[Tensor] | None:
        """All parts of ``entry`` in the main process, None in the others, which send theirs."""
        name = next(name for name in entry.mcore if (name, 0) in where)
        me = dist.get_rank() if dist.is_initialized() else 0
        parts = []
        for part in range(self.size):
            owner, shape, dtype = where[name, part]
            if owner == me:
                tensor = value(self.parameters[name][0]).contiguous()
                if me == 0:
                    parts.append(tensor.cpu())
                else:
                    dist.send(tensor, dst=0)
            elif me == 0:
                received = torch.empty(shape, dtype=dtype, device=next(iter(self.parameters.values()))[0].device)
                dist.recv(received, src=owner)
                parts.append(received.cpu())
        return parts if me == 0 else None

    def _height(self, name: str) -> int:
        return sum(1 for entry in self.entries for text in entry.hf if (match := STACKED.fullmatch(text)) and match[1] == name)


def _experts_here(config: Any) -> int:
    return int(config.num_moe_experts or 0) // int(config.expert_model_parallel_size)
