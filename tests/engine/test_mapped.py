"""What a mapped file of weights takes of memory, as Linux counts it, and that letting go of it changes no number."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from swift.engine.native.mapped import MappedWeights

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")


@pytest.fixture
def mapped(tmp_path):
    """Two tensors of 4 MiB in a mapped file, all of which was read."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(2**20, dtype=torch.int32), "b": torch.ones(2**20, dtype=torch.int32)}, path)
    with safe_open(path, framework="pt") as file:
        tensors = file.get_tensor("a"), file.get_tensor("b")
    assert [int(tensor.sum()) for tensor in tensors] == [2**19 * (2**20 - 1), 2**20]
    return path, *tensors


def resident_kib(path):
    smaps = Path("/proc/self/smaps").read_text()
    return sum(map(int, re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", smaps)))


def test_all_pages_are_given_back_and_read_again(mapped):
    path, a, b = mapped
    assert resident_kib(path) > 8000
    MappedWeights().let_go()
    assert resident_kib(path) == 0
    assert torch.equal(a, torch.arange(2**20, dtype=torch.int32))
    assert torch.equal(b, torch.ones(2**20, dtype=torch.int32))


def test_the_pages_of_one_tensor_are_given_back(mapped):
    path, a, _ = mapped
    MappedWeights().let_go(a)
    assert 4000 < resident_kib(path) < 4200


def test_what_was_written_over_is_kept(mapped):
    path, a, _ = mapped
    a[5] = -1
    MappedWeights().let_go()
    assert resident_kib(path) > 8000
    assert int(a[5]) == -1


def test_other_memory_is_left_alone():
    own = torch.arange(2**20)
    MappedWeights().let_go(own)
    assert torch.equal(own, torch.arange(2**20))
