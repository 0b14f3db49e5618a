"""The text that quantizers see, the same token ids for each of them, and other text that measures what they lost."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BUILT_IN = "pydoc"  # Python's own reference, which every installation holds
SAMPLE = "Groups of weights share a scale. " * 8


def prepare(model: Path, calibration: Sequence[str], text: Sequence[str], count: int, held: int, length: int, home: Path) -> dict[str, int]:
    """Write into ``home``: rows.jsonl for --dataset of swift; calibration.jsonl and text.jsonl, a JSON list of token ids a line.

    Every list of the calibration has ``length`` ids, its first and last special tokens included: swift's own rendering of
    the rows decides. One document never gives to both; of a file named on both sides every fourth document measures.
    """
    from transformers import AutoTokenizer

    from swift.config.export import ExportConfig
    from swift.config.options import build
    from swift.quantize.calibrate import documents

    tokenizer = AutoTokenizer.from_pretrained(model)
    home.mkdir(parents=True, exist_ok=True)

    def rendered(texts: Sequence[str], tokens: int) -> list[list[int]]:
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        (home / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        told = {"model": str(model), "quant_method": "gptq", "dataset": [str(home / "rows.jsonl")], **options(len(texts), tokens)}
        return documents(build(ExportConfig, ("benchmark", told)), tokenizer).calibration

    special = len(rendered([SAMPLE], 4096)[0]) - len(_ids(tokenizer, SAMPLE))
    sources = [_documents(name, shared=name in text, measures=False) for name in calibration]
    rows = _choose([_pieces(source, tokenizer, length - special) for source in sources], count)
    found = rendered(rows, length)
    assert len(found) == count and all(len(ids) == length for ids in found), "the rows are not what swift makes of them"

    first = tokenizer("a").input_ids[: len(tokenizer("a").input_ids) - len(_ids(tokenizer, "a"))]
    sources = [_documents(name, shared=name in calibration, measures=True) for name in text]
    pieces = _choose([_pieces(source, tokenizer, length - len(first)) for source in sources], held)
    measured = [[*first, *_ids(tokenizer, piece)] for piece in pieces]
    for name, lists in (("calibration", found), ("text", measured)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(ids) + "\n" for ids in lists))
    return {"calibration_documents": len(found), "calibration_tokens": sum(map(len, found)), "text_tokens": sum(map(len, measured))}


def options(count: int, length: int) -> dict[str, str]:
    """How swift is told to take the rows as they are."""
    return {"quant_n_samples": str(count), "max_length": str(length), "quant_eval_samples": "0"}


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _documents(name: str, *, shared: bool, measures: bool) -> list[str]:
    """Of a .jsonl file its rows' "text", of a .txt file its lines, of any other the whole."""
    if name == BUILT_IN:
        from pydoc_data.topics import topics

        found = [text for _, text in sorted(topics.items())]
    else:
        whole = Path(name).read_text(encoding="utf-8")
        if name.endswith(".jsonl"):
            found = [json.loads(line)["text"] for line in whole.splitlines()]
        else:
            found = whole.splitlines() if name.endswith(".txt") else [whole]
    return [text for number, text in enumerate(found) if not shared or (number % 4 == 0) == measures]


def _pieces(documents: Sequence[str], tokenizer: Any, length: int) -> list[str]:
    """Texts of exactly ``length`` tokens, those that are tokenized otherwise when they stand alone left out."""
    found = []
    for document in documents:
        ids = _ids(tokenizer, document)
        for begin in range(0, len(ids) - length + 1, length):
            part = ids[begin : begin + length]
            text = tokenizer.decode(part, clean_up_tokenization_spaces=False)
            if _ids(tokenizer, text) == part:
                found.append(text)
    return found


def _choose(sources: Sequence[list[str]], count: int) -> list[str]:
    """A seeded choice, as evenly from all sources as they allow."""
    generator = random.Random(0)
    queues = [generator.sample(source, len(source)) for source in sources]
    chosen: list[str] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop())
    if len(chosen) < count:
        raise SystemExit(f"too little text: {len(chosen)} pieces of the wanted {count}; name more files or ask for fewer")
    return chosen
