"""What a mapped file of weights takes of memory, as Linux counts it, and that letting go of it changes no number."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from swift.engine.native.mapped import MappedWeights, layer_by_layer, lies_in_files
from swift.model.load import load_model
from swift.model.quantized.base import Settings
from tests.quantize.checkpoints import make_checkpoint
from tests.tiny import make_model

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 4 layers of 2.75 MiB each."""
    return make_model(tmp_path_factory.mktemp("layers") / "model", num_hidden_layers=4, hidden_size=256, intermediate_size=640)


def test_one_layer_at_a_time_takes_memory(folder):
    model, ids = load_model(folder).model, torch.arange(20)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        assert resident_kib(folder / "model.safetensors") > 11000
        with layer_by_layer(model):
            MappedWeights().let_go()
            found = model(ids).logits
            assert resident_kib(folder / "model.safetensors") < 3000  # what is read again in the pages between two tensors, too
        assert torch.equal(found, wanted)
        model(ids)
    assert resident_kib(folder / "model.safetensors") > 11000  # as before: nothing is let go any more


def test_weights_that_are_not_in_their_files_alone_are_told(folder, tmp_path):
    model = load_model(folder).model
    assert lies_in_files(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1
    assert not lies_in_files(model)
    assert not lies_in_files(load_model(folder, torch_dtype="bfloat16").model)
    make_checkpoint(folder, tmp_path / "codes", "awq", Settings("awq", 4, 32, False))
    assert not lies_in_files(load_model(tmp_path / "codes").model)
