"""The declaration that the page on evaluation shows is one that works."""

import json
import re
from pathlib import Path

import pytest

from swift.api import evaluate_model

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
ROWS = [("the roof is breaking", True), ("it may snow on Friday", False), ("happy new year", False), ("a child is lost in the storm", True)]


@pytest.fixture
def declared(tmp_path):
    """The file of the page, beside data as the page says they look."""
    (found,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    path = tmp_path / "my-task.yaml"
    path.write_text(found, encoding="utf-8")
    rows = [{"text": text, "is_urgent": is_urgent} for text, is_urgent in ROWS]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"text": "?", "is_urgent": None}]), encoding="utf-8"
    )
    return str(path)


@pytest.mark.parametrize("mode", ["choice", "generate"])
def test_the_task_of_the_page_is_asked_as_the_page_says(declared, mode, tiny_model, tmp_path):
    evaluation = evaluate_model(
        str(tiny_model), eval_dataset=[declared], eval_data_dir=str(tmp_path), eval_mode=mode, eval_output_dir=str(tmp_path / "out")
    )
    (task,) = evaluation.models[0].tasks
    assert [outcome.gold for outcome in task.outcomes] == ["yes", "no", "no", "yes"]
    assert task.about.counts == {"nobody judged it": 1}
    assert task.about.num_fewshot == 2
    if mode == "choice":
        shots = "Message: the roof is breaking\nUrgent: yes\n\nMessage: it may snow on Friday\nUrgent: no\n\n"
        assert task.outcomes[2].prompt == f"Some messages cannot wait.\n\n{shots}Message: happy new year\nUrgent:"
