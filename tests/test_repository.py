"""What holds for the repository as a whole: declared dependencies, packaged files, and documents that say what is true."""

import ast
import importlib.metadata
import io
import re
import runpy
import shlex
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

import swift
from swift.cli import COMMANDS, find_command
from swift.config import commands, options
from swift.config.flags import parse

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = sorted((ROOT / "swift").rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Modules whose distribution has another name.
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow"}


def name_of(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def declared() -> set[str]:
    lists = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    return {name_of(requirement) for requirements in lists for requirement in requirements}


def imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules.add(node.module.split(".")[0])
    return modules - set(sys.stdlib_module_names) - {"swift"}


def required_extras() -> set[str]:
    return {
        keyword.value.value
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, str)
    }


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def swift_lines(path: Path) -> list[list[str]]:
    text = "\n".join(blocks(path, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := swift_words(line))]


def swift_words(line: str) -> list[str]:
    """What ``swift`` is told by a line, whatever starts it: ``... `` in it stands for a model and data. Empty if it is no such line."""
    line = re.sub(r"^([A-Z_]+=\S+ )+", "", line)
    line = re.sub(r"^torchrun .* -m swift\.cli ", "swift ", line)
    line = re.sub(r"^deepspeed .*\btrain\.py ", "swift sft ", line)
    line = re.sub(r"(--model )?\.\.\.", "--model m --dataset d", line)
    words = shlex.split(line, comments=True) if line.startswith("swift ") else []
    return words[1:]


def swift_cells(path: Path) -> list[list[str]]:
    """The commands in the tables of a page that say what may follow, and the options of training that fill a cell by themselves."""
    cells = re.findall(r"(?<=\| )`([^`\n]+)`(?= \|)", path.read_text(encoding="utf-8"))
    options = [f"swift sft ... {cell}" for cell in cells if cell.startswith("--tuner_type ")]
    return [words for line in (*(cell for cell in cells if "..." in cell), *options) if (words := swift_words(line))]


def accept(words: list[str]) -> None:
    """Read a command line as swift would; of `swift launch` the one that it starts too."""
    name, rest = find_command(words)
    class_name, _, summary = COMMANDS[name]
    module = options if class_name == "Config" else commands
    checkpoint = ("checkpoint", {"model": "m", "dataset": ["d"]}) if {"--resume_from_checkpoint", "--adapters"} & set(rest) else None
    parse(getattr(module, class_name), name, summary, rest, checkpoint=lambda _: checkpoint)
    if "--" in rest:
        accept(rest[rest.index("--") + 1 :])


def test_every_imported_package_is_declared():
    undeclared = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in SOURCES
        for module in imported(path)
        if name_of(DISTRIBUTIONS.get(module, module)) not in declared()
    }
    assert undeclared == set()


def test_every_declared_dependency_is_imported_or_required():
    source = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    modules = {name: name.replace("-", "_") for name in map(name_of, PROJECT["project"]["dependencies"])} | {"pyyaml": "yaml"}
    unused = [name for name, module in modules.items() if not re.search(rf'(import|from) {module}\b|require\("{module}"', source)]
    assert unused == []


def test_an_extra_that_an_error_names_exists_and_no_other_does():
    assert required_extras() == set(PROJECT["project"]["optional-dependencies"]) - {"dev"}


def test_the_tools_that_judge_the_code_are_pinned():
    dev = PROJECT["project"]["optional-dependencies"]["dev"]
    pinned = {name_of(requirement) for requirement in dev if "==" in requirement}
    assert pinned == {"ruff", "mypy", "import-linter"}


def test_the_benchmarks_compare_with_the_torch_of_the_tests():
    constraint = re.search(r"^torch==(\S+)$", (ROOT / "constraints-cpu.txt").read_text(encoding="utf-8"), re.MULTILINE)
    peers = re.search(r"^TORCH=(\S+)$", (ROOT / "bench" / "peers.sh").read_text(encoding="utf-8"), re.MULTILINE)
    assert constraint is not None and peers is not None
    assert constraint[1] == peers[1]


def test_every_file_that_the_package_reads_is_packaged():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    others = [path for path in (ROOT / "swift").rglob("*") if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts]
    assert len(others) >= 3
    assert [path for path in others if not any(path.match(pattern) for pattern in patterns)] == []


def test_the_installed_version_is_that_of_the_source():
    assert importlib.metadata.version("swift-llm") == swift.__version__


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda path: str(path.relative_to(ROOT)))
def test_comments_are_ascii(path):
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    assert [token.string for token in tokens if token.type == tokenize.COMMENT and not token.string.isascii()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_the_documents_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (path.parent / target).exists()] == []


@pytest.mark.parametrize("name", [str(path.relative_to(ROOT)).removesuffix("_zh.md") for path in DOCUMENTS if path.stem.endswith("_zh")])
def test_both_languages_of_a_page_show_the_same_commands_and_headings(name):
    english, chinese = ROOT / f"{name}.md", ROOT / f"{name}_zh.md"
    for language in ("bash", "python", "yaml"):
        commands = [
            [re.sub(r"(^| +)#.*", "", block, flags=re.MULTILINE) for block in blocks(path, language)] for path in (english, chinese)
        ]
        assert commands[0] == commands[1]
    levels = [re.findall(r"^#+ |^\|[-|]+\|$", path.read_text(encoding="utf-8"), re.MULTILINE) for path in (english, chinese)]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_page_is_accepted(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: m\ndataset: d\n", encoding="utf-8")
    for words in (*swift_lines(path), *swift_cells(path)):
        accept(words)


def test_the_page_on_scaling_shows_what_the_benchmark_prints(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    runpy.run_path(str(ROOT / "bench" / "scaling.py"), run_name="__main__")
    head, line, *rows = capsys.readouterr().out.splitlines()
    assert "\n".join([head, line, *rows]) in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    # In Chinese the same figures and options.
    own = [text for text in (ROOT / "docs" / "scaling_zh.md").read_text(encoding="utf-8").splitlines() if re.match(r"\| \d+B", text)]
    assert [re.findall(r"[\d.,]+[\dB]|`.*`|(?<= )\d", text) for text in own] == [
        re.findall(r"[\d.,]+[\dB]|`.*`|(?<= )\d", text) for text in rows
    ]


@pytest.mark.parametrize(("name", "count"), [("parallel", 9), ("scaling", 20), ("preferences", 2), ("tuners", 3), ("export", 3)])
def test_the_commands_of_a_page_are_found(name, count):
    path = ROOT / "docs" / f"{name}.md"
    assert len(swift_lines(path)) + len(swift_cells(path)) >= count


def test_the_readme_shows_more_than_a_few_commands():
    assert {words[0] for words in swift_lines(ROOT / "README.md")} >= {"sft", "infer", "chat", "merge-lora", "data", "runs", "audit"}


def test_the_page_on_evaluation_shows_more_than_a_few_commands():
    assert len(swift_lines(ROOT / "docs" / "evaluation.md")) > 9


@pytest.mark.parametrize("text", blocks(ROOT / "README.md", "python"))
def test_the_python_of_the_readme_uses_names_and_options_that_exist(text):
    classes = (commands.SftConfig, commands.InferConfig, commands.MergeConfig, commands.ModelOptions)
    configs = dict(zip(("sft", "infer", "merge_lora", "get_model"), classes, strict=True))
    tree = ast.parse(text)
    names = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "swift" for alias in node.names}
    assert names <= set(swift.__all__)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in configs]
    given = [(call.func.id, keyword.arg) for call in calls for keyword in call.keywords]
    assert len(given) > 5
    assert [pair for pair in given if pair[1] not in configs[pair[0]].__dataclass_fields__] == []


def test_every_make_task_of_the_readme_exists_and_make_alone_lists_it():
    tasks = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = set(re.findall(r"^make ([a-z-]+)", "\n".join(blocks(ROOT / "README.md", "bash")), re.MULTILINE))
    assert {"demo", "test"} <= shown <= tasks
