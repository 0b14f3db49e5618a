"""Packs and rows without padding by Megatron-Core: the numbers of one process, and documents that do not see one another."""

import contextlib
import io
import json
import os
import shlex

import pytest
import torch
import transformers

from swift.config.commands import SftConfig
from swift.config.options import build
from swift.data.collate import flat_batch
from swift.errors import ConfigError
from swift.launch.ray_train import work
from swift.parallel.megatron import package
from swift.parallel.megatron.context import PartAttention, filled
from swift.parallel.megatron.cpu import on_cpu
from swift.parallel.megatron.strategy import Megatron
from swift.parallel.world import join
from tests.parallel.test_megatron import QKV, same, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.multi
# A forward pass is a pack: those of a step have different lengths.
TWO = {"max_steps": 2, "eval_steps": 2, "save_strategy": "no"}
PACKS = {**TWO, "padding_free": True, "packing": True, "packing_length": 80, "max_tokens_per_batch": 80}
SHARED, DEALT = {"gradient_accumulation_steps": 4}, {"gradient_accumulation_steps": 2}
FLAT = {**TWO, "padding_free": None, "max_tokens_per_batch": 64, "gradient_accumulation_steps": 6}
PADDED = {**TWO, "padding_free": False, "gradient_accumulation_steps": 6}
STAGES = {"pipeline_model_parallel_size": 2}
# (model, options, a parameter that a process has of it with its shape, one that it has not)
CASES = {
    "tp": ("tied", {**SHARED, "tensor_model_parallel_size": 2}, (QKV.format(1), (32, 32)), None),
    "pp": ("tied", {**SHARED, **STAGES, "recompute_granularity": "full"}, (QKV.format(1), (64, 32)), QKV.format(2)),
    "vpp": ("tied", {**SHARED, **STAGES, "virtual_pipeline_model_parallel_size": 2}, (QKV.format(0), (64, 32)), QKV.format(1)),
    "ep": ("experts", {**DEALT, "expert_model_parallel_size": 2}, (QKV.format(1), (64, 32)), None),
    "ulysses": ("tied", {**SHARED, "sequence_parallel_size": 2}, (QKV.format(3), (64, 32)), None),
    "ring": ("windows", {**SHARED, "sequence_parallel_size": 2, "sequence_parallel_kind": "ring"}, (QKV.format(1), (64, 32)), None),
}
# The same rows without padding, which is the default: their numbers are those of padded rows.
UNPADDED = {"pp": STAGES}


@pytest.fixture(scope="module")
def models(megatron, folder_of, tied):
    return {"tied": tied, "experts": folder_of("qwen3_moe"), "windows": folder_of("mistral")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """16 rows of 23 to 31 tokens, and as many pairs of them."""
    folder = tmp_path_factory.mktemp("rows")
    single = [{"query": f"question {number}", "response": "snow " * (1 + number * number % 7)} for number in range(16)]
    pairs = [{**row, "rejected_response": f"rain {number}"} for number, row in enumerate(single)]
    for name, some in (("single", single), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.fixture(scope="module")
def alone(models, rows, tmp_path_factory):
    """What one process says by the usual strategy: of packs, and of padded rows and pairs."""
    out = tmp_path_factory.mktemp("alone")
    found = {name: train(path, rows / "single.jsonl", out / name, {**PACKS, **SHARED})[0] for name, path in models.items()}
    found["padded"] = train(models["tied"], rows / "single.jsonl", out / "padded", PADDED)[0]
    found["pairs"] = train(models["tied"], rows / "pairs.jsonl", out / "pairs", PADDED, command="rlhf")[0]
    return found


@pytest.fixture(scope="module")
def two(models, rows, tmp_path_factory):
    """What each of two processes says of every run, by its name."""
    return run_ranks(2, every, models, rows, tmp_path_factory.mktemp("two"), deadline_s=400)


def every(models, rows, out):
    with join(torch.device("cpu")) as world:
        found, by = {}, {"strategy": "megatron"}
        for name, (family, options, _, _) in CASES.items():
            found[name] = train(models[family], rows / "single.jsonl", out / name, {**PACKS, **options, **by})
        for name, options in UNPADDED.items():
            found[f"unpadded {name}"] = train(models["tied"], rows / "single.jsonl", out / f"flat-{name}", {**FLAT, **options, **by})
        whole = {**TWO, **STAGES, **by, "padding_free": None, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}
        with contextlib.redirect_stderr(io.StringIO()) as told:
            found["pairs"] = train(models["tied"], rows / "pairs.jsonl", out / "pairs", whole, command="rlhf")
        found["told"] = told.getvalue()
        for family, options in APART.items():
            found[f"apart {family}"] = logps_of_documents(models[family], world, options)
        found["ray"] = plan_of_worker(models["tied"], rows, out)
        other = {**PACKS, **by, "megatron_extra_kwargs": {"softmax_type": "off-by-one"}}
        with pytest.raises(ConfigError) as refused:
            train(models["tied"], rows / "single.jsonl", out / "other", other)
        found["refused"] = refused.value.message
        return found


def plan_of_worker(model, rows, out):
    """What a worker of Ray, which is told RANK and WORLD_SIZE and is joined already, plans for a command of Megatron's."""
    line = f"megatron sft --load {model} --dataset {rows / 'single.jsonl'} --save {out / 'ray'} --packing true --global_batch_size 6"
    words = shlex.split(f"{line} --pipeline_model_parallel_size 2 --dry_run true --max_steps 1")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        work({"words": words, "run_file": str(out / "run"), "folder": os.getcwd(), "path": []})
    return " ".join(said.getvalue().split())


@pytest.mark.parametrize("name", CASES)
def test_packs_train_as_in_one_process(two, alone, name):
    family, options, (present, shape), absent = CASES[name]
    for result in two:
        found, _, shapes = result[name]
        same(found, alone[family])
        rows = {whole for _, whole in shapes["parts"]}
        assert all(part * options.get("sequence_parallel_size", 1) == whole for part, whole in shapes["parts"])
        # Interleaved stages, and the dispatcher of experts on a CPU, get one length for a step.
        assert max(rows) > 60
        assert len(rows) > 1
    shapes = two[0][name][2]
    assert shapes[present] == shape
    assert absent not in shapes


@pytest.mark.parametrize("name", UNPADDED)
def test_rows_without_padding_train_as_padded_ones(two, alone, name):
    for result in two:
        found, _, shapes = result[f"unpadded {name}"]
        same(found, alone["padded"])
        assert {part for part, _ in shapes["parts"]} != {part for part, _ in two[0][name][2]["parts"]}


def test_pairs_without_padding_train_as_padded_ones(two, alone):
    for result in two:
        same(result["pairs"][0], alone["pairs"])
        assert max(whole for _, whole in result["pairs"][2]["parts"]) > 31  # the longest sequence
    # All pairs of a step are one forward pass.
    assert "a step has 1 forward passes for a pipeline of 2 processes, which wait 50% of the time" in two[0]["told"]


def test_a_worker_of_ray_takes_the_words_of_megatron(two):
    assert "6 a step = batch 1 x accumulation 6" in two[0]["ray"]
    assert "2: megatron, pp 2" in two[0]["ray"]


APART = {
    "tied": {"tensor_model_parallel_size": 2},
    "windows": {"sequence_parallel_size": 2, "sequence_parallel_kind": "ring"},
    "experts": {"expert_model_parallel_size": 2},
}
# Three documents of which two share a beginning, and with other tokens in the third.
DOCUMENTS = [list(range(10, 33)), [*range(10, 26), *range(40, 47)], list(range(60, 69))]
CHANGED = [*DOCUMENTS[:2], list(range(80, 89))]


def examples(documents):
    return [{"input_ids": ids, "labels": ids} for ids in documents]


def logps_of_documents(path, world, options):
    """((3,) log-probabilities of the documents, of the changed ones, and with filling at the end)."""
    given = {"model": "m", "dataset": "d", "strategy": "megatron", "tuner_type": "full", **options}
    config = build(SftConfig, ("python", given))
    strategy = Megatron(config, world, torch.device("cpu"), is_flat=True)
    model, _ = strategy.prepare(transformers.AutoModelForCausalLM.from_pretrained(path), lambda model: torch.optim.SGD(model.parameters()))
    policy = strategy.make_policy(model.eval())
    batches = [flat_batch(examples(some)) for some in (DOCUMENTS, CHANGED)]
    batches.append(filled(batches[0], 64))
    with torch.no_grad():
        return [policy.logps(batch) for batch in batches]


@pytest.mark.parametrize("family", APART)
def test_documents_do_not_see_one_another(two, models, family):
    model = transformers.AutoModelForCausalLM.from_pretrained(models[family])
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(1) for ids in DOCUMENTS]
    wanted = torch.stack([each.gather(1, torch.tensor(ids[1:])[:, None]).sum() for each, ids in zip(logits, DOCUMENTS, strict=True)])
    for result in two:
        found, changed, with_filling = result[f"apart {family}"]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(changed[:2], found[:2], rtol=0, atol=1e-6)
        assert abs(changed[2] - found[2]) > 1e-3
        torch.testing.assert_close(with_filling, found, rtol=1e-6, atol=1e-5)


def test_filling_is_a_document_that_predicts_nothing():
    batch = flat_batch(examples(DOCUMENTS))
    assert (batch.layout.lengths, batch.layout.parents) == ((16, 7, 7, 9), (-1, 0, 0, -1))
    longer = filled(batch, 50)
    assert (longer.layout.lengths, longer.layout.parents) == ((16, 7, 7, 9, 11), (-1, 0, 0, -1, -1))
    assert (tuple(longer.input_ids.shape), longer.position_ids[0, -11:].tolist()) == ((1, 50), list(range(11)))
    assert torch.equal(longer.layout.mask()[:39, :39], batch.layout.mask())
    assert not longer.layout.mask()[39:, :39].any()
    assert not longer.layout.mask()[:39, 39:].any()
    assert torch.equal(longer.kept_K, batch.kept_K)


def test_attention_drops_only_while_it_trains():
    kind = package.part("transformer.transformer_config").TransformerConfig
    with package.quiet():
        config = kind(num_layers=1, hidden_size=16, num_attention_heads=2, attention_dropout=0.5)
    attention = PartAttention(config, 1, None, "self")
    query, batch = torch.randn(39, 1, 2, 8), flat_batch(examples(DOCUMENTS))
    handed = type("Params", (), {"layout": batch.layout})

    def result():
        with on_cpu():
            return attention(query, query, query, packed_seq_params=handed)

    assert not torch.equal(result(), result())
    attention.eval()
    assert torch.equal(result(), result())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True, "padding_free": False}, "--packing needs rows without padding"),
        ({"max_tokens_per_batch": 64, "padding_free": False}, "--max_tokens_per_batch has no effect with --padding_free false"),
        ({"packing_length": 64}, "--packing_length has no effect without --packing true"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(SftConfig, ("python", {"model": "m", "dataset": "d", "strategy": "megatron", "tuner_type": "full", **options}))


def test_attention_that_is_not_ours_is_refused_with_packs(two):
    for result in two:
        assert result["refused"] == "--strategy megatron and rows without padding cannot be combined with softmax_type = off-by-one"
