"""How text is generated."""

from dataclasses import dataclass

from swift.config.options import Config, opt
from swift.errors import ConfigError


@dataclass(kw_only=True)
class GenerateConfig(Config):
    """Generation."""

    max_new_tokens: int | None = opt(None, "most tokens of an answer; by default what fits the context, at most 2048", minimum=1)
    temperature: float | None = opt(None, "0 always takes the likeliest token; by default the model's generation_config", minimum=0)
    top_k: int | None = opt(None, "sample among the k likeliest tokens only", minimum=0)
    top_p: float | None = opt(None, "sample among the likeliest tokens that hold this share of the probability", minimum=0, maximum=1)
    repetition_penalty: float | None = opt(None, "above 1 makes tokens that already occurred less likely", minimum=0)
    num_beams: int = opt(1, "beams of a beam search; 1 samples or takes the likeliest token", minimum=1)
    stop_words: list[str] = opt([], "texts at which an answer ends; they are not part of it")
    stream: bool | None = opt(None, "show an answer while it is written; by default in a terminal")
    infer_backend: str = opt("transformers", "engine that generates", choices=("transformers",))
    max_model_len: int | None = opt(None, "longest prompt and answer together, in tokens", minimum=2)

    def check(self) -> None:
        super().check()
        if self.temperature == 0:
            self.refuse_without_effect(("top_k", "top_p"), "with --temperature 0")
        if self.num_beams > 1 and self.stream:
            raise ConfigError("--stream needs --num_beams 1: beams are not known before the end", hint="remove one of them")
