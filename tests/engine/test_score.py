"""Log-probabilities of texts that share beginnings, beside transformers' forward pass over each text alone."""

import random

import numpy as np
import pytest
import torch

from swift.config.commands import InferConfig
from swift.config.evaluate import EvalConfig
from swift.config.options import build as build_config
from swift.engine.forward import ForwardScorer
from swift.engine.load import make_engine, source_of
from swift.engine.native import score, tree
from swift.engine.native.engine import NativeEngine, NativeOptions
from swift.engine.native.score import scorer_of
from swift.engine.native.tree import Path
from swift.engine.native.trie import trie_of
from swift.engine.scoring import Scorer, Text
from swift.engine.transformers import TransformersEngine
from swift.errors import DataError, ModelError
from swift.model.load import Loaded, load_model
from swift.model.quantized.base import Settings
from tests.engine.test_adapters import make_adapter
from tests.families import FAMILIES, build
from tests.quantize.checkpoints import make_checkpoint
from tests.tiny import make_model, make_tokenizer

VOCABULARY = 320
CPU = torch.device("cpu")


def texts_of(count=5, *, header=23, seed=0):
    """Questions behind one header, each with four choices of one to five tokens; texts that begin others, or come twice."""
    draw = random.Random(seed)

    def tokens(count):
        return tuple(draw.randrange(VOCABULARY) for _ in range(count))

    first = tokens(header)
    texts = []
    for number in range(count):
        question = first + tokens(3 + 4 * number % 13)
        letters = [(*question, letter) for letter in (7, 8, 9, 10)]
        choices = [question + tokens(draw.randint(1, 5)) for _ in range(4)]
        texts += [Text(text, len(question)) for text in (*letters, *choices)]
    texts += [Text(choices[0] + tokens(3), len(question) + 1), Text(choices[0], 1), texts[0], Text(tokens(9), 2)]
    draw.shuffle(texts)
    return texts


def loaded(model):
    return Loaded(model, make_tokenizer(), CPU, torch.float32, "test")


def model_of(family="llama", **options):
    return build(family, vocab_size=VOCABULARY, eos_token_id=2, **options)


def engine_of(family="llama", **options):
    return NativeEngine(loaded(model_of(family)), NativeOptions(**options))


def alone(model, texts):
    """(log-probabilities, is_greedy) of each text by a pass of its own over all of it."""
    found = []
    for text in texts:
        ids = torch.tensor([text.tokens])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, text.start - 1 : -1]
        scored = ids[0, text.start :]
        found.append((logits.log_softmax(-1)[range(len(scored)), scored], torch.equal(logits.argmax(-1), scored)))
    return found


def check(scorer, model, texts, tolerance=2e-4):
    found = dict(scorer.scores(texts))
    assert sorted(found) == list(range(len(texts)))
    for number, (logprobs, is_greedy) in enumerate(alone(model, texts)):
        torch.testing.assert_close(torch.tensor(found[number].logprobs), logprobs, rtol=0, atol=tolerance)
        assert found[number].is_greedy == is_greedy


@pytest.mark.parametrize("weights", [None, "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_each_text_alone(family, weights, monkeypatch):
    monkeypatch.setattr(tree, "TILE", 8)
    check(engine_of(family, weights=weights, max_num_tokens=40, max_num_seqs=8), model_of(family), texts_of())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_plain_scorer_gives_the_same(family):
    texts = texts_of()
    check(TransformersEngine(loaded(model_of(family))), model_of(family), texts, tolerance=1e-5)


@pytest.mark.parametrize("size", [1, 3, 7, 200])
def test_the_size_of_passes_changes_nothing(size):
    engine = engine_of(max_num_tokens=size, max_num_seqs=1)
    check(engine, model_of(), texts_of())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_cache_of_the_longest_text_is_enough(family):
    texts = texts_of()
    longest = max(len(text.tokens) for text in texts) - 1
    size = engine_of(family).runner.bytes_per_token()
    check(engine_of(family, block_size=1, kv_cache_bytes=size * longest), model_of(family), texts)
    with pytest.raises(DataError, match=f"{longest} tokens to compute, .* holds {longest - 1}"):
        engine_of(family, block_size=1, kv_cache_bytes=size * (longest - 1)).scores(texts)


def test_each_token_is_computed_once_and_the_last_ones_never():
    engine = engine_of()
    texts = texts_of()
    list(engine.scores(texts))
    assert engine.scorer.num_computed == len({text.tokens[:end] for text in texts for end in range(1, len(text.tokens))})
    assert engine.scorer.num_given == sum(len(text.tokens) - 1 for text in texts)


def test_a_trie_worked_by_hand():
    """5 6 | 7;  5 6 | 8 9;  5 6 8 | 9 1 (the one before begins it);  4 | 4."""
    trie = trie_of([Text((5, 6, 7), 2), Text((5, 6, 8, 9), 2), Text((5, 6, 8, 9, 1), 3), Text((4, 4), 1)])
    assert trie.ids.tolist() == [4, 5, 6, 8, 9]
    assert trie.positions.tolist() == [0, 0, 1, 2, 3]
    assert trie.rows.tolist() == [2, 2, 3, 3, 4, 0]
    assert trie.tokens.tolist() == [7, 8, 9, 9, 1, 4]
    assert trie.begins.tolist() == [0, 1, 3, 5, 6]


def test_what_rows_of_a_trie_see_worked_by_hand():
    """A path a b; in the next pass c follows b, d and e follow a one after the other, and f begins anew."""
    path = Path(6)
    path.take(np.array([0, 1]))
    places, (tile,) = path.take(np.array([2, 1, 2, 0]))
    assert places.tolist() == [2, 3, 4, 5]
    assert tile.places.tolist() == [0, 1, 2, 3, 4, 5]
    assert tile.visible.astype(int).tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    window = tile.within(2)
    assert window.places.tolist() == [0, 1, 2, 3, 4, 5]
    assert window.visible.astype(int).tolist() == [
        [0, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    places, _ = path.take(np.array([1, 2]))
    assert places.tolist() == [0, 1]  # all places but f's are free again


def test_keys_beyond_the_window_are_not_gathered():
    path = Path(10)
    path.take(np.arange(6))
    _, (tile,) = path.take(np.array([6, 7]))
    assert tile.within(3).places.tolist() == [4, 5, 6, 7]
    assert tile.within(8) is tile


@pytest.mark.parametrize("size", [1, 7, 64, 319, 320, 500])
def test_few_tokens_of_the_vocabulary_at_a_time_are_all_of_it(size, monkeypatch):
    monkeypatch.setattr(score, "SLICE", size)
    check(engine_of(), model_of(), texts_of())


def test_few_logits_at_a_time_are_those_of_all(monkeypatch):
    monkeypatch.setattr(score, "MOST_LOGITS", 3 * VOCABULARY)
    check(engine_of(), model_of(), texts_of())


def test_the_likeliest_continuation_is_greedy_and_no_other():
    model, tokens = model_of(), [5, 9, 11]
    with torch.no_grad():
        for _ in range(3):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    other = (*tokens[:-1], (tokens[-1] + 1) % VOCABULARY)
    found = dict(engine_of().scores([Text(tuple(tokens), 3), Text(other, 3), Text(other[:-1], 3)]))
    assert [found[number].is_greedy for number in range(3)] == [True, False, True]
    assert found[0].total > found[1].total


def test_scores_come_while_others_are_computed():
    engine = engine_of(max_num_tokens=16, max_num_seqs=4)
    texts = texts_of()
    scores = engine.scores(texts)
    next(scores)
    assert 0 < engine.scorer.num_computed < len({text.tokens[:end] for text in texts for end in range(1, len(text.tokens))})


def test_no_texts_have_no_scores():
    assert list(engine_of().scores([])) == []


def test_answers_between_scores_are_what_they_were():
    from tests.engine.test_native import random_prompts, run

    engine = engine_of(weights="float32")
    wanted = run(engine, random_prompts())
    texts = texts_of()
    scores = engine.scores(texts)
    some = [next(scores)]
    assert run(engine, random_prompts()) == wanted
    found = dict([*some, *scores])
    assert found == dict(engine_of(weights="float32").scores(texts))


def test_an_evaluation_packs_weights_when_the_first_answer_is_asked_for(tmp_path):
    """Until then texts are scored with the weights as they lie in their file."""
    from tests.engine.test_native import random_prompts, run

    path = make_model(tmp_path / "model")
    texts, prompts = texts_of(), random_prompts()

    def engine(command, **told):
        return make_engine(source_of(build_config(command, ("argument", {"model": str(path), **told}))))

    late = engine(EvalConfig, eval_dataset=["mmlu"])
    reference = load_model(path).model
    check(late, reference, texts)
    assert late.runner.packed is None
    scores = late.scores(texts)
    next(scores)
    assert run(late, prompts) == run(engine(InferConfig, val_dataset="none.jsonl"), prompts)
    assert late.runner.packed is not None and late.runner.program is not None
    assert len(list(scores)) == len(texts) - 1
    check(late, reference, texts)
    assert engine(EvalConfig, eval_dataset=["mmlu"], weight_format="int8").runner.packed.formats


@pytest.mark.parametrize("weights", [None, "float32"])
def test_an_adapter_beside_the_model_is_peft_s(tmp_path, weights):
    from peft import PeftModel

    path = make_adapter(tmp_path / "a")
    engine = engine_of(weights=weights)
    engine.load_adapter("a", path)
    texts = texts_of()
    adapted = PeftModel.from_pretrained(model_of(), path).eval()
    found = dict(engine.scores(texts, adapter="a"))
    for number, (logprobs, _) in enumerate(alone(adapted, texts)):
        torch.testing.assert_close(torch.tensor(found[number].logprobs), logprobs, rtol=0, atol=2e-4)
    check(engine, model_of(), texts)
    with pytest.raises(DataError, match="no adapter 'b'"):
        engine.scores(texts, adapter="b")


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_weights_in_four_bits_are_scored_as_they_are(name, tmp_path):
    """With inputs of 16 bits where torch has 32."""
    base = make_model(tmp_path / "base", hidden_size=128, intermediate_size=256)
    make_checkpoint(base, tmp_path / "model", name, Settings("awq" if name == "awq" else "gptq", 4, 32, False))
    config = build_config(InferConfig, ("argument", {"model": str(tmp_path / "model"), "val_dataset": "none.jsonl"}))
    engine = make_engine(source_of(config))
    assert engine.runner.packed.formats["int4_g32"] == 14
    assert engine.runner.program is not None
    reference, texts = load_model(tmp_path / "model", dense=True).model, texts_of()
    found = dict(engine.scores(texts))
    for number, (logprobs, _) in enumerate(alone(reference, texts)):
        torch.testing.assert_close(torch.tensor(found[number].logprobs), logprobs, rtol=0, atol=2e-3)


@pytest.mark.parametrize("make", [engine_of, lambda: TransformersEngine(loaded(model_of()))])
def test_what_cannot_be_scored_is_said_before_anything_is_computed(make):
    engine = make()
    assert isinstance(engine, Scorer)
    with pytest.raises(DataError, match="text 1 has 130 tokens, the model's context 128"):
        engine.scores([Text((1, 2), 1), Text((1,) * 130, 1)])
    with pytest.raises(DataError, match="text 0 has tokens beyond the model's 320"):
        engine.scores([Text((1, 320), 1)])
    assert len(list(engine.scores([Text((1,) * 129, 128)]))) == 1


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_logits_that_are_no_numbers_are_named(kind):
    model = model_of()
    engine = NativeEngine(loaded(model), NativeOptions()) if kind == "native" else TransformersEngine(loaded(model))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="no numbers for text 0"):
        list(engine.scores([Text((1, 2, 3), 1)]))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_a_model_in_training_is_scored_and_left_as_it_was(family):
    model = model_of(family, attention_dropout=0.1)
    model.train()
    model.get_input_embeddings().eval()
    attention, modes = model.config._attn_implementation, [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    with scorer_of(model) as scorer:
        check(scorer, model, texts_of())
        torch.rand(1)
    assert torch.equal(torch.rand(4), wanted)
    assert model.config._attn_implementation == attention
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert model.get_input_embeddings().weight.grad.isfinite().all()


def test_a_model_with_an_adapter_in_training_is_scored_with_it(tmp_path):
    from peft import PeftModel

    model = PeftModel.from_pretrained(model_of(), make_adapter(tmp_path / "a"), is_trainable=True)
    model.train()
    texts = texts_of()
    with scorer_of(model) as scorer:
        found = dict(scorer.scores(texts))
        wanted = alone(model, texts)
    for number, (logprobs, _) in enumerate(wanted):
        torch.testing.assert_close(torch.tensor(found[number].logprobs), logprobs, rtol=0, atol=2e-4)
    assert model.training


def test_tokens_that_an_adapter_puts_before_a_text_are_seen_and_not_counted():
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model_of(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    text = Text((5, 9, 11, 30), 2)
    with scorer_of(model) as scorer, torch.no_grad():
        ((_, found),) = scorer.scores([text])
        logits = model(input_ids=torch.tensor([text.tokens])).logits[0]
    assert len(logits) == 7
    wanted = logits[[4, 5]].log_softmax(-1)[[0, 1], [11, 30]]
    torch.testing.assert_close(torch.tensor(found.logprobs), wanted, rtol=0, atol=1e-5)


def test_a_model_that_cannot_be_paged_is_run_text_by_text():
    model = build("mamba", vocab_size=VOCABULARY, state_size=4)
    with scorer_of(model) as scorer:
        assert isinstance(scorer, ForwardScorer)
        check(scorer, model, texts_of(2), tolerance=1e-5)


def test_equal_texts_are_computed_once_by_the_plain_scorer(monkeypatch):
    scorer = ForwardScorer(model_of())
    calls = []
    monkeypatch.setattr(scorer, "model", lambda **inputs: calls.append(inputs) or ForwardScorer(model_of()).inner(**inputs))
    text = Text((1, 2, 3), 1)
    found = dict(scorer.scores([text, text, Text((1, 2, 3), 2)]))
    assert found[0] == found[1] and found[2].logprobs == found[0].logprobs[1:]
    assert len(calls) == 2
