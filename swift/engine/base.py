"""What all engines share: a request, what comes back of it, and the contract."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

from swift.errors import SwiftError

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Grammar:
    """What an answer must be: a value of a JSON schema, a match of a regex, one of a choice (a JSON list), a Lark grammar's word."""

    kind: Literal["json_schema", "regex", "choice", "lark"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. None leaves it to the model's generation_config; temperature 0 is greedy.

    The order is: penalties, ``logit_bias``, temperature, ``top_k``, ``top_p``, ``min_p``. ``seed`` makes an answer the same
    however many others are computed beside it, as far as their logits are.
    """

    max_new_tokens: int = 2048
    min_new_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    num_beams: int = 1
    stop_words: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    grammar: Grammar | None = None
    logprobs: int | None = None  # log-probabilities of the tokens of the answer, and of so many others at each place
    prompt_logprobs: int | None = None  # likewise of the prompt
    max_model_len: int | None = None  # prompt and answer together, in tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Media:
    """The images of a prompt, as the model's processor has made them ready.

    ``inputs`` are numpy arrays by the names that the model's forward pass has for them; ``places`` those of the prompt's
    tokens that stand for images, in order; equal ``digest`` means equal images.
    """

    inputs: Mapping[str, Any]
    places: tuple[int, ...]
    digest: bytes

    @property
    def size_bytes(self) -> int:
        return sum(int(value.nbytes) for value in self.inputs.values())


@dataclass(frozen=True, kw_only=True)
class Request:
    """``prompt`` are token ids; ``adapter`` names one that the engine has loaded, None the model itself.

    An engine that reads no images refuses a request with ``media``.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    adapter: str | None = None
    media: Media | None = None


@dataclass(frozen=True)
class Logprob:
    """A token at its place: the natural logarithm of its probability before penalties and temperature, and the likeliest tokens."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a step added to an answer; the last one has a ``finish_reason``.

    ``problem``: what went wrong with this answer alone, which is aborted; the engine goes on with the others.
    ``text`` is what is certain of the text: half a character, or what may be the beginning of a stop word, comes later.
    """

    id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob | None, ...] | None = None  # with the first delta, if wanted
    finish_reason: FinishReason | None = None
    stopped_by: int | str | None = None  # the token or the word that ended it, or why it was aborted
    num_cached: int = 0  # tokens of the prompt that were not computed
    problem: SwiftError | None = None


@dataclass(frozen=True)
class Completion:
    """An answer: its text without special tokens, its tokens without the one that ended it, and why it ended.

    ``logprobs``, if they were wanted, are of all tokens that were chosen, the one that ended it among them.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: tuple[Logprob, ...] = ()


@runtime_checkable
class Engine(Protocol):
    """Computes answers, step by step; not to be called from two threads at once."""

    def add(self, request: Request) -> None:
        """Raises DataError for a request that cannot be computed: a prompt that leaves no room, an unknown adapter."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        ...

    def step(self) -> list[Delta]:
        """Compute a little; what was added to which answer."""
        ...

    def abort(self, id: str) -> None:
        """Give up a request; nothing more comes of it. Nothing happens if it is unknown or finished."""

    def close(self) -> None:
        """Free what is held."""


def resolved(sampling: Sampling, generation_config: Any) -> Sampling:
    """``sampling`` with the model's own settings in place of None, as ``generate`` would take them.

    Without a temperature, top_k or top_p of the request, a model samples only if its generation_config says so.
    """
    given = (sampling.temperature, sampling.top_k, sampling.top_p)
    does_sample = bool(getattr(generation_config, "do_sample", False)) or any(value is not None for value in given)
    values: dict[str, Any] = {}
    for name, default in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("repetition_penalty", 1.0)):
        value = getattr(sampling, name)
        if value is None:
            value = getattr(generation_config, name, None)
        values[name] = default if value is None else value
    if sampling.temperature is None and not does_sample:
        values["temperature"] = 0.0
    return replace(sampling, **values)
