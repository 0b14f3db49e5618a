"""What every process that is forked would otherwise import, or read, by itself is here before the first fork."""

import functools
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


@pytest.fixture(scope="session")
def megatron():
    """Megatron-Core's parts, imported once rather than in each process that is forked."""
    from swift.parallel.megatron import package

    for name in ("parallel_state", "models.gpt.gpt_layer_specs", "models.gpt.gpt_model", "pipeline_parallel", "tensor_parallel"):
        package.part(name)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """A model's folder, by the name of its family and options, with the tokenizer of the tests; made once."""
    from tests.families import build
    from tests.tiny import make_tokenizer

    @functools.cache
    def make(name, **options):
        path = tmp_path_factory.mktemp(name)
        tokenizer = make_tokenizer(path)
        build(name, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **options).save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def tied(folder_of):
    """A model of four blocks whose embedding and head are one weight."""
    return folder_of("llama", num_hidden_layers=4, tie_word_embeddings=True)
