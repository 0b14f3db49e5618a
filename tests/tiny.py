"""A tiny tokenizer and a tiny random Llama for tests: made in well under a second, the same bytes every time."""

from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
_TEXTS = (
    "user system assistant the and to of is what snow in weather warning",
    "The capital of France is Paris. What is the weather in Nanjing?",
    "Heavy snow is expected. Stay at home, and keep the roads free.",
)


def make_tokenizer(path: str | Path | None = None, *, chat_template: str | None = CHATML, vocab_size: int = 320) -> Any:
    """A byte-level BPE PreTrainedTokenizerFast (eos <|im_end|>, pad <|pad|>, no bos); saved to ``path`` if given.

    Every text round-trips, because all 256 bytes are tokens; ids of the four special tokens are 0 to 3.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<|endoftext|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    if path is not None:
        tokenizer.save_pretrained(str(path))
    return tokenizer


def make_model(path: str | Path, *, chat_template: str | None = CHATML, seed: int = 0, **config: Any) -> Path:
    """Write a random Llama (2 layers, width 32, float32 safetensors) with its tokenizer to ``path``; returns the path.

    ``config`` overrides fields of LlamaConfig, for instance ``num_hidden_layers=4``.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(path, chat_template=chat_template)
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(fields | config)))
    model.to(torch.float32).save_pretrained(str(path))
    return path
