"""swift infer: answer a data set, or questions in the terminal."""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift import console
from swift.config.commands import InferConfig
from swift.data.load import load_records
from swift.data.records import Message, Record
from swift.data.template import ChatTemplate
from swift.engine.answers import answers, pieces
from swift.engine.base import Completion, Engine, Media, Request
from swift.engine.load import adapter_or_model_path, make_engine, sampling, source_of
from swift.engine.logprobs import content_of, speller
from swift.engine.media import ImagePrompts, text_prompt
from swift.engine.pictures import of_row
from swift.engine.source import Source
from swift.errors import ConfigError, DataError
from swift.files import explain_os_errors
from swift.model.template import read_system


def run_infer(config: InferConfig) -> list[dict[str, Any]] | None:
    """Answers to the rows of --val_dataset (or --dataset), one jsonl line each; a conversation if neither is given."""
    if not (config.dataset or config.val_dataset):
        from swift.engine.chat import converse

        converse(source_of(config, merge=config.merge_lora), system=read_system(config.system))
        return None
    records = _records(config)
    place = _result_path(config)
    results = _answered(place, records, has_logprobs=config.logprobs)
    if results:
        console.say(f"{place} holds the first {len(results)} of {len(records)} answers; the rest follow")
    source = source_of(config, merge=config.merge_lora)
    engine = make_engine(source)
    place.parent.mkdir(parents=True, exist_ok=True)
    spell = speller(source.tokenizer)
    begin, tokens, count = time.monotonic(), 0, len(results)
    with explain_os_errors(place), place.open("a", encoding="utf-8") as file, console.progress() as bar:
        task = bar.add_task("infer", total=len(records), completed=count, facts="")
        rest = records[count:]
        for record, answer in zip(rest, _answer(source, engine, rest, first=count), strict=True):
            result = as_result(record, answer, {"content": content_of(answer.logprobs, spell)} if config.logprobs else None)
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
            file.flush()
            results.append(result)
            tokens += len(answer.token_ids)
            bar.update(task, advance=1)
    engine.close()
    seconds = time.monotonic() - begin
    rate = f"{tokens} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s)"
    console.say(f"answers: {len(results)}, {rate}; written to {place}")
    return results


def answer_prompts(config: InferConfig, prompts: list[str]) -> list[str]:
    """The answers to ``prompts``, each a user message of its own."""
    system = read_system(config.system)
    start = [Message(role="system", content=system)] if system else []
    records = [Record(messages=[*start, Message(role="user", content=text)], source="argument") for text in prompts]
    source = source_of(config, merge=config.merge_lora)
    engine = make_engine(source)
    texts = [answer.text for answer in _answer(source, engine, records)]
    engine.close()
    return texts


def _records(config: InferConfig) -> list[Record]:
    """The rows to answer. A run's saved data: its validation rows, split as the run split them."""
    loaded = load_records(
        config.dataset or config.val_dataset,
        want="grpo",
        columns=config.columns,
        strict=config.strict,
        max_rejected=config.max_rejected,
        data_seed=config.data_seed,
        shuffle=config.dataset_shuffle if config.load_data_args else False,
        model_name=config.model_name,
        model_author=config.model_author,
        system=read_system(config.system),
        split_ratio=config.split_dataset_ratio,
        val_datasets=config.val_dataset if config.dataset else [],
        use_hf=config.use_hf,
        hub_token=config.hub_token,
        offline=config.offline,
    )
    for rejected in loaded.rejected:
        console.warn(f"{rejected.source} is left out: {rejected.reason}")
    records = loaded.validation or loaded.train
    return records[: config.val_dataset_sample]


def _result_path(config: InferConfig) -> Path:
    if config.result_path is not None:
        return Path(config.result_path)
    folder = adapter_or_model_path(config) or Path("infer_result")
    return (folder / "infer_result" if folder.name != "infer_result" else folder) / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"


def _answered(place: Path, records: list[Record], *, has_logprobs: bool) -> list[dict[str, Any]]:
    """The answers that ``place`` holds from a run that was stopped; a last line that is not whole is cut off.

    Raises ConfigError if they are no answers to the first of ``records``, or not all of them with log-probabilities or all without.
    """
    if not place.exists():
        return []
    with explain_os_errors(place):
        raw = place.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    lines = whole.decode("utf-8", "replace").splitlines()
    found: list[dict[str, Any]] = []
    for line, record in zip(lines, records, strict=False):
        try:
            result = json.loads(line)
            is_same = result["messages"][:-1] == [{"role": message.role, "content": message.content} for message in record.messages]
        except (ValueError, TypeError, KeyError):
            is_same = False
        if not is_same:
            break
        found.append(result)
    if len(found) < len(lines) or (raw and not lines):
        raise ConfigError(f"--result_path {place} exists and holds something else", hint="name another file, or remove it")
    if any((result.get("logprobs") is not None) != has_logprobs for result in found):
        was, now = ("out", "leave that out") if has_logprobs else ("", "say that")
        raise ConfigError(f"--result_path {place} was begun with{was} --logprobs true", hint=f"{now}, or name another file")
    if len(whole) < len(raw):
        with explain_os_errors(place):
            os.truncate(place, len(whole))
    return found


def _answer(source: Source, engine: Engine, records: list[Record], *, first: int = 0) -> Iterator[Completion]:
    """Answers in the order of ``records``, of which the first one is number ``first``.

    The seed of each depends on its number, so that neither batches nor a stop between change anything.
    """
    config = source.config
    reader = None
    if source.processor is not None and source.tokenizer.chat_template:
        reader = ImagePrompts(source.processor, ChatTemplate(source.tokenizer))

    def asked(number: int, record: Record) -> Request:
        prompt, media = _prompt(source, record, reader)
        return Request(id=str(number), prompt=prompt, sampling=replace(sampling(config), seed=config.seed + number), media=media)

    requests = (asked(number, record) for number, record in enumerate(records, start=first))
    if not config.stream or console.is_json():
        yield from answers(engine, requests)
        return
    for request, record in zip(requests, records, strict=True):
        print(f"> {record.messages[-1].text()}")
        written = pieces(engine, request)
        try:
            while True:
                sys.stdout.write(next(written))
                sys.stdout.flush()
        except StopIteration as end:
            print("\n")
            yield end.value


def _prompt(source: Source, record: Record, reader: ImagePrompts | None) -> tuple[tuple[int, ...], Media | None]:
    """Token ids and images of a row. DataError if it has what the model does not read."""
    config = source.config
    if record.videos or record.audios:
        raise DataError(f"{record.source}: the row has videos or audios, which no engine reads")
    if not record.images:
        ids = text_prompt(source, record.messages, record.tools, use_chat_template=config.use_chat_template is not False)
        return tuple(ids), None
    if source.processor is None:
        raise DataError(f"{record.source}: the row has images, the model reads text only")
    if config.use_chat_template is False or reader is None or not reader.takes_images:
        raise DataError(f"{record.source}: the row has images, which need a chat template that takes them")
    template = ChatTemplate(source.tokenizer, enable_thinking=config.enable_thinking)
    text = template.text([message.for_template() for message in record.messages], record.tools, prompt=True)
    try:
        return reader.ready(text, [of_row(image) for image in record.images])
    except (DataError, ValueError) as problem:
        raise DataError(f"{record.source}: {problem}") from None


def as_result(record: Record, answer: Completion, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    """A line of the result file: ms-swift's members, and why the answer ended."""
    messages = [{"role": message.role, "content": message.content} for message in record.messages]
    return {
        "response": answer.text,
        "labels": record.extra.get("response"),
        "logprobs": logprobs,
        "messages": [*messages, {"role": "assistant", "content": answer.text}],
        "finish_reason": answer.finish_reason,
        **({"images": [_name_of(image) for image in record.images]} if record.images else {}),
        "source": record.source,
    }


def _name_of(image: Any) -> str | None:
    """The file or URL of an image; None for one that the row itself holds."""
    found = image.get("path") if isinstance(image, dict) else image
    return found if isinstance(found, str) else None
