"""What engines of other packages share: an answer whose tokens they compute, and the refusal of what they do not know."""

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

from swift.engine.base import Delta, FinishReason, Logprob, Request, Sampling, resolved
from swift.engine.growing import Growing, check_request, decoder, refuse_unknown, room_after
from swift.engine.source import Source
from swift.engine.writer import Writer
from swift.errors import DataError

# What every engine must be able to be told.
ALWAYS = frozenset("max_new_tokens stop_words stop_token_ids ignore_eos skip_special_tokens max_model_len".split())


def reason_of(said: str | None) -> FinishReason | None:
    """A finish reason as an engine calls it: what is neither a stop nor a length, such as an error, is an abort."""
    return "stop" if said == "stop" else "length" if said == "length" else None if said is None else "abort"


class Answer:
    """A request under way. ``settled`` are its settings, with the model's own where it has none; ``room`` the tokens it may have."""

    def __init__(self, request: Request, settled: Sampling, source: Source, room: int) -> None:
        self.request, self.settled, self.room = request, settled, room
        self.own_ends = source.ends  # that the model has, whether they count here or not
        self.ends = frozenset({*(() if settled.ignore_eos else self.own_ends), *settled.stop_token_ids})
        writer = Writer(decoder(source.tokenizer, skip_special_tokens=settled.skip_special_tokens), settled.stop_words)
        self._growing = Growing(request.id, writer, self.ends, room)

    @property
    def num_tokens(self) -> int:
        """Of the answer so far."""
        return self._growing.num_tokens

    def add(
        self,
        token_ids: Iterable[int],
        logprobs: Sequence[Logprob] = (),
        *,
        ended: FinishReason | None = None,
        follow: Callable[[int], bool] = lambda token: False,
    ) -> Delta | None:
        """As of Growing; None if they add nothing."""
        delta = self._growing.add(token_ids, logprobs, ended=ended, follow=follow)
        return delta if delta.token_ids or delta.finish_reason is not None else None


@dataclass(frozen=True)
class Taker:
    """Takes requests for ``backend``, which knows the settings ``known`` besides those that all must know."""

    backend: str
    source: Source
    known: frozenset[str]

    def answer(self, request: Request, under_way: Container[str], max_model_len: int) -> Answer:
        """The answer to ``request``, still empty. Raises DataError for what the engine cannot compute."""
        check_request(request, under_way)
        if request.media is not None:
            raise DataError(f"images: not with --infer_backend {self.backend}", hint="--infer_backend native or transformers reads them")
        refuse_unknown(request.sampling, self.known | ALWAYS, self.backend)
        settled = resolved(request.sampling, self.source.generation_config)
        if "repetition_penalty" not in self.known and settled.repetition_penalty != 1.0:
            raise DataError(
                f"repetition_penalty {settled.repetition_penalty}, which the model's generation_config asks for: "
                f"not with --infer_backend {self.backend}",
                hint="--repetition_penalty 1 does without it",
            )
        return Answer(request, settled, self.source, room_after(len(request.prompt), request.sampling, max_model_len))
