import json
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from swift.errors import ModelError
from swift.export.gguf.vocabulary import TEXT, sentencepiece_ids, vocabulary
from swift.hub.gguf_splits import pre_tokenizer, splits
from tests.tiny import make_tokenizer


def byte_level(pre: Any, *, ignore_merges: bool = False) -> Any:
    """A tokenizer of 600 tokens learned on the text of the trial, so that a different way to split gives different ids."""
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer = pre
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def sentencepiece(*, prefix: bool = True) -> Any:
    """A tokenizer of Llama's kind: a space is a letter, and what has no piece becomes bytes."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "\u2581")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = TEXT.split()[:40]
    core.train_from_iterator(words * 3, trainers.BpeTrainer(vocab_size=450, special_tokens=special, show_progress=False))
    data = json.loads(core.to_str())
    data["added_tokens"] = [entry for entry in data["added_tokens"] if not entry["content"].startswith("<0x")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    return tokenizer


@pytest.mark.parametrize("way", splits(), ids=lambda way: way["pre"])
def test_each_way_to_split_is_recognized(way: dict[str, Any]):
    found = vocabulary(byte_level(pre_tokenizer(way), ignore_merges=way["ignore_merges"]), 700, [])
    assert (found.keys["tokenizer.ggml.pre"], found.warning) == (way["pre"], None)


def test_digits_before_the_regex_of_gpt2_are_what_smollm_does():
    pre = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert vocabulary(byte_level(pre), 700, []).keys["tokenizer.ggml.pre"] == "smollm"


def test_a_way_to_split_that_llama_cpp_does_not_have_is_refused():
    pre = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[aeiou]"), behavior="merged_with_next"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    with pytest.raises(ModelError, match=r"in a way that llama\.cpp does not have"):
        vocabulary(byte_level(pre), 700, [])


def test_rows_without_a_token_are_unused():
    keys = vocabulary(make_tokenizer(), 322, []).keys
    assert keys["tokenizer.ggml.tokens"][320:] == ["[PAD320]", "[PAD321]"]
    assert keys["tokenizer.ggml.token_type"][320:] == [5, 5]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gives_the_same_ids_by_scores_as_by_merges(prefix: bool):
    tokenizer = sentencepiece(prefix=prefix)
    found = vocabulary(tokenizer, 450, [])
    keys = found.keys
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.add_space_prefix"], found.warning) == ("llama", prefix, None)
    assert keys["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    parts = [keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores")]
    for text in (TEXT, "Hello  \u2603 world", " x", "sure they"):
        assert sentencepiece_ids(text, *parts, prefix) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "model", [models.WordLevel({"<unk>": 0, "<|end|>": 1}, unk_token="<unk>"), models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)]
)
def test_tokenizers_of_other_kinds_are_refused(model: Any):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>", eos_token="<|end|>")
    with pytest.raises(ModelError, match="has no form in GGUF files"):
        vocabulary(tokenizer, 10, [])


def test_two_tokens_of_one_text_are_refused():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["[PAD325]"])
    with pytest.raises(ModelError, match=r"two tokens have the text '\[PAD325\]'"):
        vocabulary(tokenizer, 330, [])
