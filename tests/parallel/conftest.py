"""What every process that is forked would otherwise import, or read, by itself is here before the first fork."""

import importlib

import pytest

IMPORTED = (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "rich.progress",
    "rich.table",
    "swift.parallel.spread",
    "swift.train.run",
    "transformers.models.llama.modeling_llama",
)


@pytest.fixture(scope="session", autouse=True)
def prepared():
    for name in IMPORTED:
        importlib.import_module(name)
    import peft

    from tests.families import build

    # PEFT reads transformers' tables of names for its first adapter.
    peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
