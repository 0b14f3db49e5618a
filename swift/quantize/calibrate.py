"""The text that a quantizer looks at, and other text of the same kind that measures what was lost."""

import random
from dataclasses import dataclass
from typing import Any

from swift import console
from swift.data.load import load_records
from swift.data.records import Message, Record
from swift.data.render import Renderer
from swift.errors import DataError
from swift.model.template import read_system

LEAST = 16  # tokens of a document that is worth a forward pass


@dataclass(frozen=True)
class Documents:
    """Token ids of whole documents or parts of one, never of two: to calibrate with, and ``held_out`` to measure with."""

    calibration: list[list[int]]
    held_out: list[list[int]]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.calibration))


def documents(config: Any, tokenizer: Any, *, calibrates: bool = True) -> Documents:
    """Documents of --dataset, or of the built-in text: a seeded choice, of which those that measure come first.

    The choice of those that measure does not depend on how many calibrate. DataError if there are too few.
    """
    wanted = config.quant_n_samples if calibrates else 0
    if wanted + config.quant_eval_samples == 0:
        return Documents([], [])
    renderer = Renderer(tokenizer, objective="pt", use_chat_template=config.use_chat_template is not False)
    held: list[list[int]] = []
    kept: list[list[int]] = []
    faults: list[str] = []
    for record in _records(config, has_template=renderer.template is not None):
        if len(held) >= config.quant_eval_samples and len(kept) >= wanted:
            break
        try:
            pieces = [piece for piece in _pieces(record, renderer, config.max_length) if len(piece) >= LEAST]
        except DataError as problem:
            faults.append(problem.message)
            continue
        target, most = (held, config.quant_eval_samples) if len(held) < config.quant_eval_samples else (kept, wanted)
        target += pieces[: most - len(target)]  # the rest of a document goes nowhere: both sides stay apart
    if len(faults) > len(held) + len(kept):
        raise DataError(
            f"most rows cannot be rendered, the first because {faults[0]}", hint="--columns renames columns; see swift data inspect"
        )
    if faults:
        console.warn(f"{len(faults)} rows are left out, since they cannot be rendered: the first because {faults[0]}")
    if (not held and config.quant_eval_samples) or (not kept and wanted):
        raise DataError(
            f"too little text: {len(held)} documents to measure with and {len(kept)} to calibrate with, of at least {LEAST} tokens",
            hint="give more rows with --dataset, or fewer --quant_eval_samples",
        )
    if len(kept) < wanted:
        console.warn(f"the data has {len(kept)} documents to calibrate with, {wanted} were asked for (--quant_n_samples)")
    return Documents(kept, held)


def _records(config: Any, *, has_template: bool) -> list[Record]:
    """All records, in a seeded order."""
    if not config.dataset:
        found = _built_in(has_template=has_template)
    else:
        options = {"use_hf": config.use_hf, "hub_token": config.hub_token, "offline": config.offline}
        options |= {"columns": config.columns, "data_seed": config.data_seed, "system": read_system(config.system)}
        try:
            found = list(load_records(config.dataset, want="sft", shuffle=False, **options).train)
        except DataError as problem:
            try:
                found = list(load_records(config.dataset, want="pt", shuffle=False, **options).train)  # plain text
            except DataError:
                raise problem from None
    random.Random(config.data_seed).shuffle(found)
    return found


def _built_in(*, has_template: bool) -> list[Record]:
    """Prose and code of Python's own reference, which every installation holds, and the weather notices in two languages.

    The notices are conversations: a model without a chat template gets the answers alone.
    """
    from pydoc_data.topics import topics

    prose = [Record([Message("assistant", text)]) for _, text in sorted(topics.items())]
    notices = list(load_records(["snow-alerts"], shuffle=False).train)
    return prose + (notices if has_template else [Record([record.messages[-1]]) for record in notices])


def _pieces(record: Record, renderer: Renderer, length: int) -> list[list[int]]:
    ids = [rendered.input_ids for rendered in renderer.tokenize(renderer.lay_out(record))]
    return [row[begin : begin + length] for row in ids for begin in range(0, len(row), length)]
