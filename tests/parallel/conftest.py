"""What every process that is forked would otherwise import, or read, by itself is here before the first fork."""

import importlib

import pytest

MODULES = (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "rich.progress",
    "rich.table",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
    "swift.parallel.spread",
    "swift.train.run",
)


@pytest.fixture(scope="session", autouse=True)
def prepared():
    import peft

    from tests.families import build

    for name in MODULES:
        importlib.import_module(name)
    # PEFT reads transformers' tables of names for its first adapter.
    peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
