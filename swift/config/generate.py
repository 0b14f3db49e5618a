"""How text is generated."""

from dataclasses import dataclass
from typing import ClassVar

from swift.config.backends import BACKENDS, BackendsConfig
from swift.config.options import opt
from swift.errors import ConfigError

MOST_LOGPROBS = 20  # likeliest tokens at each place, as in OpenAI's API


@dataclass(kw_only=True)
class GenerateConfig(BackendsConfig):
    """Generation."""

    scores_first: ClassVar[bool] = False  # whether the command asks for scores of texts before it asks for answers, if for any

    max_new_tokens: int | None = opt(None, "most tokens of an answer; by default what fits the context, at most 2048", minimum=1)
    temperature: float | None = opt(None, "0 always takes the likeliest token; by default the model's generation_config", minimum=0)
    top_k: int | None = opt(None, "sample among the k likeliest tokens only", minimum=0)
    top_p: float | None = opt(None, "sample among the likeliest tokens that hold this share of the probability", minimum=0, maximum=1)
    repetition_penalty: float | None = opt(None, "above 1 makes tokens that already occurred less likely", minimum=0)
    num_beams: int = opt(1, "beams of a beam search; 1 samples or takes the likeliest token", minimum=1)
    stop_words: list[str] = opt([], "texts at which an answer ends; they are not part of it")
    logprobs: bool = opt(False, "write the log-probability of each token of an answer, in OpenAI's form")
    top_logprobs: int | None = opt(
        None, "with --logprobs true: also those of so many of the likeliest tokens at each place", minimum=0, maximum=MOST_LOGPROBS
    )
    stream: bool | None = opt(None, "show an answer while it is written; by default in a terminal")
    infer_backend: str | None = opt(
        None,
        "engine that generates; by default native, or transformers where that cannot run the model",
        choices=BACKENDS,
    )
    max_model_len: int | None = opt(None, "longest prompt and answer together, in tokens", minimum=2)
    max_batch_size: int | None = opt(
        None, "answers computed at the same time; by default 64 (native, openvino), 16 (llamacpp, remote) or 1 (transformers)", minimum=1
    )
    kv_cache_gib: float = opt(1.0, "native, openvino: memory for keys and values, taken as it is used", minimum=0.001)
    max_num_batched_tokens: int = opt(512, "native, openvino: tokens of one forward pass; longer prompts take several", minimum=1)
    enable_prefix_caching: bool = opt(True, "native, openvino: compute the common beginning of prompts once")
    weight_format: str | None = opt(
        None,
        "native on a CPU: format in which weights are kept, computed with in float32; by default the smallest one that loses nothing;"
        " torch leaves them to torch's own kernels",
        choices=("float32", "float16", "bfloat16", "int8", "int4", "torch"),
    )
    num_speculative_tokens: int = opt(0, "native: tokens guessed from what was said before, computed along and kept if right", minimum=0)

    def check(self) -> None:
        super().check()
        self.check_backend(self.infer_backend, self.max_model_len)
        if self.temperature == 0:
            self.refuse_without_effect(("top_k", "top_p"), "with --temperature 0")
        if self.top_logprobs is not None and not self.logprobs:
            raise ConfigError(f"--top_logprobs {self.top_logprobs} needs --logprobs true", hint="say both, or neither")
        if self.num_beams > 1 and self.logprobs:
            raise ConfigError(f"--logprobs true needs --num_beams 1, not {self.num_beams}: beams give none", hint="remove one of them")
        if self.num_beams > 1 and self.stream:
            raise ConfigError("--stream needs --num_beams 1: beams are not known before the end", hint="remove one of them")
