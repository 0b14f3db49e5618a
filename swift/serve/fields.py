"""Fields that several requests of the API share, and how they become the engine's."""

import json
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from swift.engine.base import Grammar, Sampling
from swift.serve import limits

Count = Annotated[int, Meta(ge=0, lt=2**31)]
AtLeastOne = Annotated[int, Meta(ge=1, lt=2**31)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
TokenText = Annotated[str, Meta(pattern="^[0-9]{1,9}$")]
StopWord = Annotated[str, Meta(max_length=1024)]
Label = Annotated[str, Meta(max_length=512)]
Metadata = Annotated[dict[Annotated[str, Meta(max_length=64)], Label], Meta(max_length=16)]


class Strict(Struct, forbid_unknown_fields=True):
    """A part of a request. What it does not know is refused by name; types are not guessed."""


def check_free(name: str, value: Any) -> None:
    """ValueError if ``value``, whose form is free, is so deep or so large that reading it would hold up others."""
    level, num_values = [value], 0
    for _ in range(limits.MOST_DEPTH):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        num_values += len(inner)
        if num_values > limits.MOST_VALUES:
            raise ValueError(f"{name} has more than {limits.MOST_VALUES} values")
        if not inner:
            return
        level = inner
    raise ValueError(f"{name} has more than {limits.MOST_DEPTH} levels")


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(Strict):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        check_free("schema", self.schema)


class TextFormat(Strict, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(Strict, tag_field="type", tag="json_object"):
    pass


class JsonSchemaFormat(Strict, tag_field="type", tag="json_schema"):
    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(Strict):
    """Exactly one of these, as vLLM names them."""

    json: dict[str, Any] | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.json, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar")
        check_free("json", self.json)

    def as_grammar(self) -> Grammar:
        if self.json is not None:
            return Grammar("json_schema", json.dumps(self.json))
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar("choice", json.dumps(self.choice))
        return Grammar("lark", self.grammar or "")


class SamplingFields(Strict, kw_only=True):
    """How tokens are chosen: OpenAI's fields, then what others have added and users expect."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopWord | Annotated[list[StopWord], Meta(max_length=16)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenText, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None

    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    min_tokens: Count | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None

    # These change nothing of an answer and are taken for the caller's own use.
    metadata: Metadata | None = None
    prompt_cache_key: Label | None = None
    safety_identifier: Label | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = None

    def __post_init__(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.store:
            raise ValueError("store: answers are not stored; leave it out")

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def stop_words(self) -> tuple[str, ...]:
        words = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(word for word in words if word)

    def sampling(
        self,
        *,
        max_new_tokens: int,
        logprobs: int | None,
        grammar: Grammar | None,
        prompt_logprobs: int | None = None,
        keeps_tags: bool = False,
    ) -> Sampling:
        """``keeps_tags``: special tokens are part of the text, since calls of tools may be marked by them."""
        return Sampling(
            max_new_tokens=max_new_tokens,
            min_new_tokens=self.min_tokens or 0,
            temperature=None if self.temperature is None else _temperature(self.temperature),
            top_k=None if self.top_k is None else max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            seed=self.seed,
            stop_words=self.stop_words(),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            skip_special_tokens=self.skip_special_tokens is not False and not keeps_tags,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
        )


def _temperature(given: float) -> float:
    """Logits divided by so little overflow; the likeliest token is all that is left anyway."""
    return 0.0 if given < 1e-4 else given
