"""From a whole model to a process's part of a pipeline."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist

from swift import console
from swift.model.policy import Policy
from swift.parallel.pipeline.costs import Costs, measure
from swift.parallel.pipeline.partition import partition
from swift.parallel.pipeline.run import Pipeline
from swift.parallel.pipeline.stages import Stages, check
from swift.parallel.pipeline.structure import observe


def split(
    model: Any,
    group: Any,
    device: torch.device,
    *,
    tokens: int,
    is_flat: bool,
    schedule: str = "1f1b",
    virtual: int = 1,
    costs: Costs | None = None,
    autocast: Callable[[], Any] = contextlib.nullcontext,
    call: Callable[..., Any] = lambda function, *arguments: function(*arguments),
) -> Pipeline:
    """Leave in ``model`` what this process of the pipeline ``group`` computes. All processes of the run call it at once.

    The model may be wrapped by PEFT and its layers may be shared by tensor parallel processes; FSDP shards it afterwards.
    Stages get runs of blocks that take equally long by ``costs``. By default these are measured: blocks, embedding and head
    are timed with ``tokens``, those of a usual forward pass. ConfigError, in one line, for what cannot be split.
    """
    structure = observe(model, autocast)
    processes = dist.get_world_size(group)
    stages = processes * virtual
    partition([1.0] * len(structure.blocks), stages)  # too many stages are told before anything is timed
    if costs is None:
        box = [measure(Policy(model, call=call), structure, tokens, is_flat=is_flat, autocast=autocast, call=call)]
        dist.broadcast_object_list(box, src=0)  # the clocks of others differ, their stages must not
        costs = box[0]
    runs = partition(costs.blocks, stages, first=costs.first, last=costs.last)
    check(structure, runs)
    console.say(
        f"pipeline of {processes} processes ({schedule}): {', '.join(str(len(run)) for run in runs)} blocks in its stages; "
        f"the embedding takes as long as {costs.first:g} of them, the head as {costs.last:g}"
    )
    return Pipeline(Stages(model, structure, runs, dist.get_rank(group), processes), group, device, schedule=schedule)
