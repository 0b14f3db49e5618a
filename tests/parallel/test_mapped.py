"""A process that keeps a part of a model never holds all of it: private memory, as the kernel counts it."""

import contextlib
import ctypes
import functools
import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from swift.config.commands import SftConfig
from swift.config.options import build
from swift.errors import MachineError
from swift.model.mapped import LEAST, MappedWeights, is_private
from swift.parallel.choose import arrange, make_strategy
from swift.parallel.mapped import LOCK, mapped_weights
from swift.parallel.world import World, join
from swift.train.build import load_for_training
from swift.train.memory import is_scarce
from swift.train.optim import make_optimizer
from swift.tuner import TUNERS
from tests.ranks import run_ranks
from tests.tiny import make_model

pytestmark = pytest.mark.multi
CPU = torch.device("cpu")
MIB = 2**20
SLACK = 6 * MIB  # activations of the trials, what torch and the allocator keep
FIELDS = {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}

# name: (options, share of the float32 weights that a process keeps)
TWO = {
    "fsdp2": ({"fsdp": "fsdp2"}, 1 / 2),
    "tensor": ({"tensor_model_parallel_size": 2}, 1 / 2),
    "pipeline": ({"pipeline_model_parallel_size": 2}, 2 / 3),
    "zero3": ({"deepspeed": "zero3"}, 1 / 2),
    # half a byte for each number, cut in two, and the adapter; scales, of 4 bytes for 64 numbers, are mapped
    "qlora": ({"fsdp": "fsdp2", "tuner_type": "lora", "quant_bits": 4, "bnb_4bit_use_double_quant": False}, 1 / 12),
}
FOUR = {
    "fsdp2": (TWO["fsdp2"][0], 1 / 4),
    "tensor x fsdp2": ({"tensor_model_parallel_size": 2, "fsdp": "fsdp2"}, 1 / 4),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of 74 MiB in float32, whose file has 16 bits for each number, and a small one of the same kind."""
    big = make_model(tmp_path_factory.mktemp("big") / "model", hidden_size=512, intermediate_size=1376, **FIELDS)
    AutoModelForCausalLM.from_pretrained(big, dtype=torch.bfloat16).save_pretrained(big)
    return make_model(tmp_path_factory.mktemp("small") / "model", **FIELDS), big


def private() -> int:
    """Bytes of memory of this process alone; pages of files that it has not written to are not among them.

    What the allocator keeps although it was freed goes back first.
    """
    ctypes.CDLL(None).malloc_trim(0)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """The most private memory within the block, above what there was before."""

    def __enter__(self):
        gc.collect()
        self.before, self.bytes, self.is_over = private(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.is_over.wait(0.01):
            self.bytes = max(self.bytes, private() - self.before)

    def __exit__(self, *_):
        if self.is_over.is_set():
            return
        self.is_over.set()
        self.thread.join()
        self.bytes = max(self.bytes, private() - self.before)


def prepare(path, options, world):
    """A model in ``path`` as a run has it when it begins to train."""
    config = build(SftConfig, ("python", {"model": str(path), "dataset": ["rows"], "tuner_type": "full", "learning_rate": 1e-3, **options}))
    arrangement = arrange(config, world)
    with mapped_weights(world) as weights:
        loaded = load_for_training(config, path, device="cpu", weights=weights)
        assert loaded.dtype == torch.float32
        strategy = make_strategy(config, arrangement, world, CPU, None, tokens=16, is_flat=True)
        torch.manual_seed(0)
        model = TUNERS.get(config.tuner_type)().apply(loaded.model, config)
        model, _ = strategy.prepare(model, functools.partial(make_optimizer, config=config))
    return strategy, model


def peaks(models, cases):
    """{name: (most bytes while the large model was loaded and cut, bytes that are kept of it, one of its weights or none)}."""
    found = {}
    with join(CPU) as world:
        for name, (options, _) in cases.items():
            prepare(models[0], options, world)  # what is imported and set up once
            with Peak() as peak, cut_by_deepspeed(peak) if name == "zero3" else contextlib.nullcontext():
                strategy, model = prepare(models[1], options, world)
            whole = strategy.whole(model, only=lambda name: name.endswith("layers.5.mlp.down_proj.weight"))
            found[name] = peak.bytes, strategy.local_bytes()["weights"], list(whole.values())
    return found


@contextlib.contextmanager
def cut_by_deepspeed(peak):
    """Within, ``peak`` ends when the weights are cut: DeepSpeed then makes gradients and a copy that is trained."""
    import deepspeed

    initialize = deepspeed.initialize

    def begins(**arguments):
        peak.__exit__()
        return initialize(**arguments)

    deepspeed.initialize = begins
    try:
        yield
    finally:
        deepspeed.initialize = initialize


@pytest.mark.slow
@pytest.mark.parametrize(("size", "cases"), [(2, TWO), (4, FOUR)])
def test_a_process_never_holds_more_than_its_part_and_one_layer(models, cache, size, cases):
    stored = load_file(models[1] / "model.safetensors")
    total, layer = (4 * sum(each.numel() for name, each in stored.items() if part in name) for part in ("", "layers.0."))
    assert 73 * MIB < total < 75 * MIB and layer < 13 * MIB
    if "zero3" in cases:
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
        from swift.parallel.deepspeed import package

        package.load("cpu")
    results = run_ranks(size, peaks, models, cases)
    for name, (_, share) in cases.items():
        for result in results:
            most, held, whole = result[name]
            assert held < 1.1 * share * total, (name, held / MIB)
            assert most < held + layer + SLACK, (name, most / MIB, held / MIB)
            if name != "qlora" and whole:
                assert torch.equal(whole[0], stored["model.layers.5.mlp.down_proj.weight"].float())
    assert not list((cache / "mapped").iterdir())


def test_what_loading_computes_is_shared_and_changed_by_one_process_alone(tmp_path):
    linear, one, other = torch.nn.Linear(300, 200), MappedWeights(tmp_path), MappedWeights(tmp_path)
    wanted = linear.weight.detach().clone()
    twin = torch.nn.Linear(300, 200)
    twin.load_state_dict(linear.state_dict())
    assert is_private(linear.weight.data)
    one.keep(linear)
    other.keep(twin)
    assert not is_private(linear.weight.data) and linear.bias.nbytes < LEAST
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(linear.weight, wanted)
    twin.weight.data = torch.zeros(200, 300)
    third = MappedWeights(tmp_path)
    third.keep(twin)  # other numbers in the same place get a file of their own
    assert torch.equal(linear.weight, wanted) and not twin.weight.any() and len(list(tmp_path.iterdir())) == 2


def test_folders_of_processes_that_were_killed_are_removed(cache):
    old = cache / "mapped" / "old"
    old.mkdir(parents=True)
    (old / LOCK).touch()
    with mapped_weights(World()) as weights:
        assert not old.exists() and weights.folder.is_dir()
        with mapped_weights(World()) as others:  # that of a run that goes on stays
            assert weights.folder.is_dir() and others.folder != weights.folder
    assert not list((cache / "mapped").iterdir())


def _map(cache):
    os.environ["SWIFT_CACHE"] = str(cache)
    with join(CPU) as world:
        try:
            with mapped_weights(world):
                return "mapped"
        except (MachineError, SystemExit) as problem:
            return str(problem)


def test_a_place_that_cannot_be_written_ends_all_processes_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    said, others = run_ranks(2, _map, tmp_path / "file")
    assert "Not a directory" in said and "\n" not in said and others == "1"


def test_files_are_used_when_whole_models_would_take_more_than_half_of_the_free_memory(models, monkeypatch):
    stored = (models[1] / "model.safetensors").stat().st_size  # 2 bytes a number
    for free, processes, wanted in ((8.1 * stored, 2, False), (7.9 * stored, 2, True), (8.1 * stored, 4, True), (None, 4, False)):
        monkeypatch.setattr("swift.train.memory.free_bytes", lambda _, free=free: free)
        assert is_scarce(models[1], processes) is wanted
    with mapped_weights(World(), is_needed=False) as weights:
        assert weights is None
