"""What every process that is forked would otherwise import, or read, by itself is here before the first fork."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def prepared():
    import peft
    import transformers.models.llama.modeling_llama  # noqa: F401

    import swift.parallel.spread
    import swift.train.run  # noqa: F401
    from tests.families import build

    # PEFT reads transformers' tables of names for its first adapter.
    peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
