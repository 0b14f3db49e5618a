"""Records to a data set of token ids in memory-mapped files, kept under a digest of all that went into it."""

import gc
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.data import pool
from swift.data.encoded import Encoded
from swift.data.records import Record, Rejected, summary
from swift.data.render import IGNORED, OBJECTIVES, Rendered, Renderer
from swift.data.spool import Records, pack, unpack
from swift.data.writer import Chunk, Example, Writer
from swift.errors import ConfigError, DataError

TRUNCATION = ("delete", "left", "right", "split")
FORMAT_VERSION = 2
CHUNK_ROWS = 256
# A process that tokenizes needs seconds to start, in which another one does as many rows.
ROWS_A_PROCESS = 5_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """All that decides what a record becomes, besides the tokenizer."""

    objective: str
    max_length: int | None
    truncation_strategy: str
    loss_scale: str
    use_chat_template: bool
    chat_template: str | None
    enable_thinking: bool | None

    def check(self) -> None:
        if self.objective not in (*OBJECTIVES, "preference"):
            raise ConfigError(f"unknown objective {self.objective!r}", hint=f"known: {', '.join(OBJECTIVES)}, preference")
        if self.truncation_strategy not in TRUNCATION:
            raise ConfigError(f"unknown truncation_strategy {self.truncation_strategy!r}", hint=f"known: {', '.join(TRUNCATION)}")
        if self.truncation_strategy == "split" and self.objective != "pt":
            raise ConfigError(
                "truncation_strategy split is for pre-training: pieces of a conversation lose their prompt",
                hint="use delete, left or right",
            )
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}", hint="give at least 2 tokens")

    def renderer(self, tokenizer: Any) -> Renderer:
        return Renderer(
            tokenizer,
            objective="sft" if self.objective == "preference" else self.objective,
            loss_scale=self.loss_scale,
            use_chat_template=self.use_chat_template,
            chat_template=self.chat_template,
            enable_thinking=self.enable_thinking,
        )


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int | None,
    truncation_strategy: str = "delete",
    objective: str = "sft",
    loss_scale: str = "default",
    use_chat_template: bool = True,
    chat_template: str | None = None,
    enable_thinking: bool | None = None,
    num_proc: int = 1,
    cache_dir: str | Path | None = None,
) -> Encoded:
    """Tokenize ``records`` into an Encoded; with ``cache_dir`` equal input is read from there and not tokenized again.

    ``objective``: sft, pt, classify (nothing is trained; labels are the records'), or preference, whose examples are
    pairs. Longer than ``max_length`` tokens: ``delete`` rejects the row, ``right`` keeps the beginning, ``left`` the
    end (and a BOS token that stands only at the beginning), ``split`` (pt) makes several examples. A row without a
    trained token, or that cannot be rendered, is in ``.rejected`` with the reason; ``.stats()`` counts. Raises
    DataError if no row is left.
    """
    options = Options(
        objective=objective,
        max_length=max_length,
        truncation_strategy=truncation_strategy,
        loss_scale=loss_scale,
        use_chat_template=use_chat_template,
        chat_template=chat_template,
        enable_thinking=enable_thinking,
    )
    return encode_with(records, tokenizer, options, num_proc=num_proc, cache_dir=cache_dir)


def encode_with(
    records: Sequence[Record], tokenizer: Any, options: Options, *, num_proc: int = 1, cache_dir: str | Path | None = None
) -> Encoded:
    """``encode``, with its options as one value."""
    options.check()
    renderer = options.renderer(tokenizer)
    place = None
    if cache_dir is not None:
        place = Path(cache_dir) / digest(records, renderer.tokenizer, options)
        if (place / "meta.json").is_file():
            return Encoded.open(place)
    writer = Writer(is_paired=options.objective == "preference", place=place)
    with writer:
        for chunk in _chunks(records, tokenizer, renderer, options, num_proc):
            writer.add(chunk)
        if writer.num_examples == 0:
            raise DataError("no row is left to train on", hint=summary(writer.rejected))
        return writer.finish()


def digest(records: Sequence[Record], tokenizer: Any, options: Options) -> str:
    """The name of the result in the cache: sha256 over records, tokenizer, template, options and format version."""
    import msgspec

    sha = hashlib.sha256(f"swift encode {FORMAT_VERSION}".encode())
    sha.update(tokenizer.backend_tokenizer.to_str().encode())
    template = tokenizer.chat_template
    facts = [template, {key: str(token) for key, token in tokenizer.special_tokens_map.items()}, options]
    sha.update(msgspec.json.encode(facts, order="deterministic"))
    for blob in packed(records):
        sha.update(len(blob).to_bytes(8))
        sha.update(blob)
    return sha.hexdigest()


def packed(records: Sequence[Record]) -> Iterator[bytes]:
    """The records as they travel to other processes."""
    return records.packed() if isinstance(records, Records) else map(pack, records)


def _chunks(records: Sequence[Record], tokenizer: Any, renderer: Renderer, options: Options, num_proc: int) -> Iterator[Chunk]:
    starts = range(0, len(records), CHUNK_ROWS)
    num_proc = min(num_proc, len(records) // ROWS_A_PROCESS)
    if num_proc <= 1:
        # The objects of imported modules are not looked through again and again: a tenth of the time.
        gc.freeze()
        try:
            for start in starts:
                yield encode_chunk(renderer, options, start, records[start : start + CHUNK_ROWS])
        finally:
            gc.unfreeze()
        return
    blobs = packed(records)
    parts = ((start, list(itertools.islice(blobs, CHUNK_ROWS))) for start in starts)
    with pool.workers(num_proc, start_worker, (tokenizer, options)) as workers:
        yield from pool.in_order(workers, num_proc, work, parts)


_worker: tuple[Renderer, Options] | None = None


def start_worker(tokenizer: Any, options: Options) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    _worker = (options.renderer(tokenizer), options)


def work(part: tuple[int, list[bytes]]) -> Chunk:
    assert _worker is not None
    return encode_chunk(*_worker, part[0], [unpack(blob) for blob in part[1]])


class _TooLong(DataError):
    """A row that truncation_strategy delete leaves out."""

    def __init__(self, num_tokens: int, limit: int) -> None:
        super().__init__(f"{num_tokens} tokens, more than max_length {limit}")
        self.num_tokens = num_tokens


def encode_chunk(renderer: Renderer, options: Options, start: int, records: Sequence[Record]) -> Chunk:
    """Lay out the records, tokenize all texts in one call, cut and check."""
    layouts: list[Any] = []
    plan: list[list[int] | DataError] = []  # per record: the number of sequences of each side, or what is wrong
    for record in records:
        try:
            sides = [renderer.lay_out(side) for side in _sides(record, options)]
        except DataError as error:
            plan.append(error)
            continue
        layouts += [layout for side in sides for layout in side]
        plan.append([len(side) for side in sides])
    rendered = iter(renderer.tokenize(layouts))
    chunk = Chunk()
    for index, (record, counts) in enumerate(zip(records, plan, strict=True)):
        try:
            if isinstance(counts, DataError):
                raise counts
            ids = [[next(rendered) for _ in range(count)] for count in counts]
            examples = _examples(ids, record, start + index, options, renderer.tokenizer.bos_token_id)
        except DataError as error:
            too_long = error.num_tokens if isinstance(error, _TooLong) else None
            chunk.reject(Rejected(record.source, _row(record), error.message), too_long)
            continue
        num_sequences = 1 if options.objective == "preference" else len(ids[0])
        chunk.add(examples, is_split=len(examples) > num_sequences)
    return chunk


def _sides(record: Record, options: Options) -> list[Record]:
    if options.objective != "preference":
        return [record]
    import dataclasses

    return [record, dataclasses.replace(record, messages=record.rejected or [], rejected=None)]


def _examples(sides: list[list[Rendered]], record: Record, index: int, options: Options, bos: int | None) -> list[Example]:
    extras = {"label": record.label, "margin": record.margin, "channel": record.channel}
    extras = {name: value for name, value in extras.items() if value is not None}
    if options.objective == "preference":
        if [len(side) for side in sides] != [1, 1]:
            raise DataError("the chat template rewrites earlier turns, so that a pair needs loss_scale last_round")
        cut = [_cut(side[0], options, bos) for side in sides]
        lost = sum(len(side[0].input_ids) for side in sides) - sum(len(pieces[0].input_ids) for pieces in cut)
        return [Example([pieces[0] for pieces in cut], index, extras, lost)]
    made = []
    for rendered in sides[0]:
        pieces = _cut(rendered, options, bos)
        lost = len(rendered.input_ids) - sum(len(piece.input_ids) for piece in pieces)
        made += [Example([piece], index, extras, lost if number == 0 else 0) for number, piece in enumerate(pieces)]
    return made


def _cut(rendered: Rendered, options: Options, bos: int | None) -> list[Rendered]:
    """The sequence within max_length (several for ``split``); DataError if it must go or has no trained token."""
    length, limit = len(rendered.input_ids), options.max_length
    if limit is None or length <= limit:
        pieces = [rendered]
    elif options.truncation_strategy == "delete":
        raise _TooLong(length, limit)
    elif options.truncation_strategy == "right":
        pieces = [_slice(rendered, slice(0, limit))]
    elif options.truncation_strategy == "left":
        pieces = [_keep_end(rendered, limit, bos)]
    else:
        pieces = [_slice(rendered, slice(start, start + limit)) for start in range(0, length, limit)]
        pieces = [piece for piece in pieces if len(piece.input_ids) > 1]
    is_trained = all(any(label != IGNORED for label in piece.labels[1:]) for piece in pieces)
    if options.objective != "classify" and not is_trained:
        cut = f" after cutting {length} tokens to {limit}" if limit is not None and length > limit else ""
        raise DataError(f"no trained token{' is left' if cut else ''}{cut}")
    return pieces


def _keep_end(rendered: Rendered, limit: int, bos: int | None) -> Rendered:
    ids = rendered.input_ids
    end = _slice(rendered, slice(len(ids) - limit, len(ids)))
    if ids[0] == bos and bos not in ids[1:]:
        end.input_ids[0], end.labels[0] = ids[0], rendered.labels[0]
        if end.weights is not None and rendered.weights is not None:
            end.weights[0] = rendered.weights[0]
    return end


def _slice(rendered: Rendered, part: slice) -> Rendered:
    weights = rendered.weights[part] if rendered.weights is not None else None
    return Rendered(rendered.input_ids[part], rendered.labels[part], weights)


def _row(record: Record) -> dict[str, Any]:
    """The record as a row that could be read again."""
    row: dict[str, Any] = {"messages": [message.for_template() for message in record.messages]}
    if record.rejected:
        row["rejected_messages"] = [message.for_template() for message in record.rejected]
    return row
