"""Scores questions with swift's native engine from Python: what `bench/evaluate.py` measures.

python bench/scored.py JOB.json      model, items (prompt, answers), output: one JSON line an item, log-probabilities of its answers
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the swift that this file lies beside

from swift.config.commands import InferConfig
from swift.config.options import build
from swift.engine.load import make_engine, source_of
from swift.engine.scoring import Scorer, Text


def texts_of(tokenizer: Any, prompt: str, answers: list[str]) -> list[Text]:
    """Prompt and answer in one piece; an answer's tokens are those behind as many as the prompt alone has."""
    start = len(tokenizer(prompt).input_ids)
    return [Text(tuple(tokenizer(prompt + answer).input_ids), start) for answer in answers]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    told = {"model": job["model"], "val_dataset": "none.jsonl", "torch_dtype": "float32", **job.get("options", {})}
    source = source_of(build(InferConfig, ("benchmark", told)))
    engine = make_engine(source)
    assert isinstance(engine, Scorer)
    texts: list[Text] = []
    begins = [0]
    for item in job["items"]:
        texts += texts_of(source.tokenizer, item["prompt"], item["answers"])
        begins.append(len(texts))
    found = dict(engine.scores(texts))
    lines = []
    for begin, end in itertools.pairwise(begins):
        lines.append(json.dumps({"scores": [found[number].total for number in range(begin, end)]}) + "\n")
    Path(job["output"]).write_text("".join(lines))
    scorer = getattr(engine, "scorer", None)
    print(json.dumps({"computed": getattr(scorer, "num_computed", None), "given": sum(len(text.tokens) - 1 for text in texts)}))


if __name__ == "__main__":
    main()
