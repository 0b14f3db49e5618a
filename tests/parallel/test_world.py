"""How processes meet, and how copies of parameters add up their gradients."""

import time

import pytest
import torch
from torch import distributed as dist
from torch import nn

from swift.errors import ConfigError
from swift.parallel.replicate import Replicas
from swift.parallel.world import join
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def _meet_three_times():
    found = []
    for _ in range(3):
        with join(CPU, timeout_s=20) as world:
            with join(CPU) as same:  # a caller has joined already
                assert same == world
            found.append(world.gather(world.rank))
            if world.is_main:
                time.sleep(0.3)  # the others have left, and come again, while this one is still there
    return found


def _sums(used):
    """Buckets sent during the backward pass, and sums of gradients, of parameters of which each process has used some."""
    with join(CPU, timeout_s=20) as world:
        parameters = [nn.Parameter(torch.ones(4)) for _ in range(4)]
        replicas = Replicas(parameters, dist.group.WORLD, bucket_bytes=1)
        replicas.expect()
        sum((world.rank + 1) * parameters[index].sum() for index in used[world.rank]).backward()
        early = len(replicas._sent)
        replicas.finish()
        return early, [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]


@pytest.mark.multi
def test_processes_meet_again_while_one_of_them_is_late():
    assert run_ranks(2, _meet_three_times, deadline_s=60) == [[[0, 1]] * 3] * 2


@pytest.mark.multi
def test_processes_that_use_other_parameters_add_up_the_same_sums():
    wanted = [None, [2.0] * 4, [1.0] * 4, [3.0] * 4]
    assert run_ranks(2, _sums, ([3, 2], [3, 1]), deadline_s=60) == [(2, wanted), (1, wanted)]


def test_without_copies_nothing_is_sent():
    Replicas([], None).finish()  # there is no group here, nor one for tensors in main memory beside NCCL


def test_one_device_is_not_for_several_processes(monkeypatch):
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--device cuda:0 is one device, and 2 processes"), join(torch.device("cuda:0")):
        pass
