"""The native engine beside transformers' own greedy search, whatever is computed together, in parts, again or ahead."""

import pytest
import torch

from swift.engine.answers import answers, pieces
from swift.engine.base import Request, Sampling
from swift.engine.native.engine import NativeEngine, NativeOptions
from swift.engine.native.runner import paging_fault
from swift.errors import DataError, ModelError
from swift.model.load import Loaded
from tests.families import FAMILIES, build
from tests.tiny import make_tokenizer

GREEDY = Sampling(max_new_tokens=12, temperature=0)
VOCABULARY = 320


def random_prompts(count=7, *, seed=0):
    """Prompts of unequal length, of which some begin alike."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(4, VOCABULARY, (11,), generator=generator).tolist()
    prompts = []
    for number in range(count):
        own = torch.randint(4, VOCABULARY, (1 + 5 * number % 17,), generator=generator).tolist()
        prompts.append((shared if number % 2 else []) + own)
    return prompts


def loaded(family="llama", **options):
    model = build(family, vocab_size=VOCABULARY, eos_token_id=2, **options)
    return Loaded(model, make_tokenizer(), torch.device("cpu"), torch.float32, "test")


def engine_of(family="llama", **options):
    return NativeEngine(loaded(family), NativeOptions(**options))


def run(engine, prompts, sampling=GREEDY, **changes):
    requests = [Request(id=str(number), prompt=tuple(prompt), sampling=sampling) for number, prompt in enumerate(prompts)]
    return [answer.token_ids for answer in answers(engine, requests)]


def greedy(family, prompts, count=12):
    """Tokens that transformers' generate finds for each prompt alone, without the end."""
    model = build(family, vocab_size=VOCABULARY, eos_token_id=2)
    found = []
    for prompt in prompts:
        ids = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        found.append(ids[:-1] if ids[-1] == 2 else ids)
    return found


@pytest.mark.parametrize("weights", [None, "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_generate(family, weights):
    prompts = random_prompts()
    assert run(engine_of(family, weights=weights), prompts) == greedy(family, prompts)


@pytest.mark.parametrize("weights", [None, "auto"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_oss", "qwen3_moe"])
def test_parts_preemption_sharing_and_guesses_change_nothing(family, weights):
    prompts = random_prompts(9, seed=1)
    size = engine_of(family).runner.bytes_per_token()
    engine = engine_of(family, block_size=4, max_num_seqs=5, max_num_tokens=7, kv_cache_bytes=size * 4 * 12, num_guessed=3, weights=weights)
    found = run(engine, prompts)
    assert found == greedy(family, prompts)
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.is_idle
    assert engine.scheduler.blocks.num_free == 12


def test_a_second_run_takes_prompts_from_the_cache_and_answers_the_same():
    engine = engine_of(block_size=4)
    prompts = random_prompts()
    first = run(engine, prompts)
    engine.add(Request(id="again", prompt=tuple(prompts[3]), sampling=GREEDY))
    assert engine.step()[0].num_cached == len(prompts[3]) - 1
    engine.abort("again")
    assert run(engine, prompts) == first


def test_without_a_shared_cache_nothing_is_found():
    engine = engine_of(block_size=4, shares_prefixes=False)
    prompts = random_prompts()
    assert run(engine, prompts) == greedy("llama", prompts)
    engine.add(Request(id="again", prompt=tuple(prompts[3]), sampling=GREEDY))
    assert engine.step()[0].num_cached == 0


def test_a_seed_gives_the_same_sample_alone_and_among_others():
    prompts = random_prompts()
    sampling = Sampling(max_new_tokens=12, temperature=0.9, top_p=0.95, seed=5)
    together = run(engine_of(), prompts, sampling)
    alone = [run(engine_of(), [prompt], sampling)[0] for prompt in prompts]
    assert together == alone
    assert run(engine_of(), prompts, Sampling(max_new_tokens=12, temperature=0.9, top_p=0.95, seed=6)) != together


def test_guesses_change_no_sample():
    prompt = [5, 6, 7, 8] * 5
    sampling = Sampling(max_new_tokens=20, temperature=0.3, seed=1)
    assert run(engine_of(num_guessed=4), [prompt], sampling) == run(engine_of(), [prompt], sampling)


def test_right_guesses_save_passes():
    model = loaded()
    plain, guessing = (NativeEngine(model, NativeOptions(num_guessed=count)) for count in (0, 4))
    prompt = tuple(random_prompts(1)[0])
    sampling = Sampling(max_new_tokens=60, temperature=0, ignore_eos=True)
    passes = []
    for engine in (plain, guessing):
        engine.add(Request(id="a", prompt=prompt, sampling=sampling))
        steps = 0
        while engine.step():
            steps += 1
        passes.append(steps)
    assert passes[0] == 60
    assert passes[1] < 60  # a random model soon repeats itself


def test_pieces_make_the_whole_text():
    engine = engine_of()
    prompt = random_prompts()[2]
    (whole,) = answers(engine, [Request(id="a", prompt=tuple(prompt), sampling=GREEDY)])
    assert "".join(pieces(engine, Request(id="b", prompt=tuple(prompt), sampling=GREEDY))) == whole.text


def test_a_closed_answer_leaves_nothing_under_way():
    engine = engine_of()
    written = pieces(engine, Request(id="a", prompt=(5, 6, 7), sampling=Sampling(max_new_tokens=500, temperature=0, ignore_eos=True)))
    next(written)
    written.close()
    assert engine.step() == []
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


def test_an_answer_ends_at_a_stop_word_or_token_which_is_no_part_of_it():
    engine = engine_of()
    prompt = tuple(random_prompts()[2])
    (whole,) = answers(engine, [Request(id="a", prompt=prompt, sampling=GREEDY)])
    text = engine.loaded.tokenizer.decode(whole.token_ids[:5])
    word = text[-2:]
    engine.add(Request(id="b", prompt=prompt, sampling=Sampling(max_new_tokens=12, temperature=0, stop_words=(word,))))
    deltas = [delta for _ in range(12) for delta in engine.step()]
    assert deltas[-1].finish_reason == "stop" and deltas[-1].stopped_by == word
    assert "".join(delta.text for delta in deltas) == whole.text[: whole.text.index(word)]
    token = whole.token_ids[3]
    sampling = Sampling(max_new_tokens=12, temperature=0, stop_token_ids=(token,))
    (short,) = answers(engine, [Request(id="c", prompt=prompt, sampling=sampling)])
    assert short.token_ids == whole.token_ids[: whole.token_ids.index(token)]
    assert short.finish_reason == "stop"


def test_log_probabilities_are_those_of_the_model():
    engine = engine_of(max_num_tokens=8, max_num_seqs=2)
    prompt = random_prompts()[5]
    sampling = Sampling(max_new_tokens=4, temperature=0, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    engine.add(Request(id="a", prompt=tuple(prompt), sampling=sampling))
    deltas = [delta for _ in range(20) for delta in engine.step()]
    tokens = [token for delta in deltas for token in delta.token_ids]
    found = [value for delta in deltas for value in delta.logprobs]
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        wanted = build("llama", vocab_size=VOCABULARY, eos_token_id=2)(ids).logits[0].log_softmax(-1)
    of_prompt = deltas[0].prompt_logprobs
    assert of_prompt[0] is None and len(of_prompt) == len(prompt)
    for place, value in enumerate([*of_prompt[1:], *found]):
        assert value.token_id == ids[0, place + 1]
        assert value.logprob == pytest.approx(float(wanted[place, value.token_id]), abs=1e-4)
        assert value.top[0][1] == pytest.approx(float(wanted[place].max()), abs=1e-4)
    assert all(len(value.top) == 2 for value in found)


def test_a_prompt_without_room_for_an_answer_is_refused_and_others_go_on():
    engine = engine_of()
    engine.add(Request(id="good", prompt=(5, 6), sampling=GREEDY))
    with pytest.raises(DataError, match="128 tokens, the model's context 128"):
        engine.add(Request(id="long", prompt=(5,) * 128, sampling=GREEDY))
    with pytest.raises(DataError, match="no tokens"):
        engine.add(Request(id="empty", prompt=(), sampling=GREEDY))
    with pytest.raises(DataError, match="under way"):
        engine.add(Request(id="good", prompt=(5, 6), sampling=GREEDY))
    assert [delta.id for delta in engine.step()] == ["good"]


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_token_that_the_model_lacks_is_refused(token):
    with pytest.raises(DataError, match=f"beyond the model's {VOCABULARY}"):
        engine_of().add(Request(id="a", prompt=(5, token), sampling=GREEDY))


def test_a_full_context_ends_the_answer():
    engine = engine_of()
    sampling = Sampling(max_new_tokens=50, temperature=0, ignore_eos=True)
    (answer,) = answers(engine, [Request(id="a", prompt=(5,) * 120, sampling=sampling)])
    assert len(answer.token_ids) == 8
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("bloom", {"n_layer": 2, "n_head": 4}),
        ("llama4_text", {"num_local_experts": 2}),
    ],
)
def test_a_model_that_keeps_more_than_keys_and_values_is_refused(family, options):
    model = build(family, **options)
    assert paging_fault(model) is not None
    with pytest.raises(ModelError, match="cannot run"):
        NativeEngine(Loaded(model, make_tokenizer(), torch.device("cpu"), torch.float32, "test"), NativeOptions())
