"""Models of many families are cut by their structure, and those whose stages compute something else are refused."""

import contextlib
import copy

import pytest
import torch

from swift.data.collate import flat_batch, flat_batches
from swift.errors import ConfigError
from swift.model.attention import use_packed_attention
from swift.model.policy import Policy
from swift.parallel.pipeline.costs import measure
from swift.parallel.pipeline.partition import partition
from swift.parallel.pipeline.run import without_root
from swift.parallel.pipeline.stages import Stages, check
from swift.parallel.pipeline.structure import observe
from tests.families import build

HALVES = [range(0, 2), range(2, 4)]


@pytest.mark.parametrize(
    ("family", "options", "beside"),
    [
        ("llama", {}, ["embed_tokens", "norm", "lm_head"]),
        ("gpt2", {}, ["wte", "wpe", "ln_f", "lm_head"]),  # learned positions
        ("gemma2", {}, ["embed_tokens", "norm", "lm_head"]),  # scaled embeddings, windows in every other block, capped logits
        (
            "opt",
            {"word_embed_proj_dim": 16},
            ["embed_tokens", "embed_positions", "project_in", "final_layer_norm", "project_out", "lm_head"],
        ),
    ],
)
def test_stages_one_after_the_other_are_the_model(family, options, beside):
    model = build(family, num_hidden_layers=4, **options)
    structure = observe(model)
    assert sorted(side.name for side in structure.sides) == sorted(beside)
    for stages in (2, 4):
        check(structure, partition([1.0] * 4, stages))  # raises unless the logits are the same
    held = []
    for rank in range(2):
        part = copy.deepcopy(model)
        stages = Stages(part, observe(part), HALVES, rank, 2)
        held.append({parameter_name for parameter_name, _ in part.named_parameters()})
        assert len(stages.local_blocks) == 2
        assert Policy(part).has_own_head == Policy(model).has_own_head  # of opt it cannot be told apart, of a part as of the whole
        with stages.seen_whole():
            shapes = {name: parameter.shape for name, parameter in part.named_parameters(remove_duplicate=False)}
            assert shapes == {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
            assert sum(parameter.is_meta for parameter in part.parameters()) > 0
        assert not any(parameter.is_meta for parameter in part.parameters())
        assert part.get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape
    both = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert held[0] | held[1] == both
    assert not held[0] & held[1]


def test_the_trial_finds_stages_that_compute_something_else():
    model = build("llama", num_hidden_layers=4)
    structure = observe(model)
    with pytest.raises(ConfigError, match=r"a pipeline cannot be made of LlamaForCausalLM: its stages do not compute what it does"):
        check(structure, [range(0, 2), range(3, 4)])


def test_a_decoder_whose_blocks_depend_on_one_another_is_refused():
    model = build("llama", num_hidden_layers=4)
    kept = {}
    model.model.layers[0].register_forward_hook(lambda block, args, output: kept.update(first=output))
    model.model.layers[3].register_forward_hook(lambda block, args, output: output + kept["first"])
    with pytest.raises(ConfigError, match="its stages do not compute what it does"):
        check(observe(model), HALVES)


def test_a_model_without_a_list_of_blocks_is_refused():
    model = build("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(ConfigError, match="a pipeline cannot be made of LlamaForCausalLM: the layers of this model cannot be found"):
        observe(model)


def test_a_trained_weight_that_three_stages_use_is_refused():
    model = build("llama", num_hidden_layers=4, tie_word_embeddings=True)
    for block in model.model.layers:
        block.input_layernorm.weight = model.model.norm.weight
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.input_layernorm\.weight is trained and used by 4 of its processes"):
        Stages(model, observe(model), partition([1.0] * 4, 4), 0, 4)


def test_a_large_head_costs_more_than_a_small_one_and_measuring_leaves_no_gradient():
    found = []
    for vocabulary in (128, 16384):
        model = build("llama", num_hidden_layers=4, vocab_size=vocabulary)
        state = torch.get_rng_state()
        costs = measure(Policy(model), observe(model), 64, is_flat=False, autocast=contextlib.nullcontext, call=lambda f, *a: f(*a))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert costs.blocks == [1.0] * 4
        found.append(costs.last)
    assert found[1] > 2 * found[0]


def test_what_all_documents_begin_with_stands_in_each_row_again():
    beginning = list(range(1, 21))
    rows = [{"input_ids": [*beginning, *tail], "labels": [-100] * 20 + tail} for tail in ([4, 8], [5, 6], [7, 8, 9], [6, 9])]
    shared = [without_root(batch) for batch in flat_batches([rows[:2], rows[2:]])]
    # The 20th token predicts one that is trained, so each row has its own; the larger pass comes first.
    assert [batch.layout.lengths for batch in shared] == [(19, 3, 4), (19, 3, 3)]
    model = build("llama")
    use_packed_attention(model)
    with torch.no_grad():
        found = sum(float(Policy(model).cross_entropy(batch)[0]) for batch in shared)
        wanted = sum(float(Policy(model).cross_entropy(flat_batch([row], share=False))[0]) for row in rows)
    assert found == pytest.approx(wanted, rel=1e-6)
