"""Small data sets in the layouts in which authors publish theirs, with rows of our own."""

from pathlib import Path
from typing import Any

from swift.config.evaluate import EvalConfig


def eval_config(**options: Any) -> EvalConfig:
    return EvalConfig(**options)


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding, newline="")
    return path


def make_mmlu(folder: Path) -> Path:
    """Two subjects as hendrycks/test has them: no header, a question over two lines."""
    write(folder / "dev" / "astronomy_dev.csv", "What shines?,Stars,Stones,Water,Air,A\nWhat orbits?,Fog,Moons,Sand,Ice,B\n")
    write(folder / "test" / "astronomy_test.csv", '"Which is\nhot, and far?",Ice,Snow,The Sun,Rain,C\nWhat is cold?,Fire,Ice,Sun,Tea,B\n')
    write(folder / "dev" / "marketing_dev.csv", "Who buys?,Customers,Trees,Clouds,Fish,A\nWhat sells?,Rocks,Goods,Fog,Noise,B\n")
    write(folder / "test" / "marketing_test.csv", "What is paid?,A price,A tree,A cloud,A fish,A\n")
    return folder


def make_ceval(folder: Path) -> Path:
    write(
        folder / "dev" / "law_dev.csv",
        'id,question,A,B,C,D,answer,explanation\n0,谁立法？,议会,石头,云,鱼,A,"1. 议会立法。\n2. 所以选A。"\n',
    )
    write(folder / "val" / "law_val.csv", "\ufeffid,question,A,B,C,D,answer\n0,谁审判？,云,法院,鱼,树,B\n1,谁守法？,石头,云,人人,鱼,C\n")
    return folder


def make_ocnli(folder: Path) -> Path:
    rows = [
        '{"sentence1":"他在家","sentence2":"他不在外面","label":"entailment","prem_id":"a"}',
        '{"sentence1":"他在家","sentence2":"他在睡觉","label":"-","prem_id":"a"}',
        '{"sentence1":"下雪了","sentence2":"天很热","label":"contradiction","prem_id":"b"}',
    ]
    write(folder / "dev.json", "\n".join(rows) + "\n")
    return folder
