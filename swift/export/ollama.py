"""Export to Ollama: a GGUF file, and the Modelfile that `ollama create` reads."""

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from swift import console
from swift.config.export import ExportConfig
from swift.export import gguf
from swift.export.gguf.about import generation
from swift.export.go_template import Pieces, find_pieces
from swift.files import write_text
from swift.hub.facts import licence_of
from swift.model.artifact import Artifact, ModelFolder
from swift.model.tokenizer import load_tokenizer
from swift.quantize.measure import Measured, Reference

MODELFILE = "Modelfile"
QUOTES = '"""'
CONTEXT = 8192  # tokens that Ollama makes room for at most, unless its user asks for more
# {parameter of a Modelfile: name in generation_config.json}
PARAMETERS = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "repeat_penalty": "repetition_penalty"}


def check(model: ModelFolder, config: ExportConfig) -> None:
    """See Exporter."""
    gguf.check(model, config)


def run(model: ModelFolder, config: ExportConfig, folder: Path) -> Artifact:
    """See Exporter."""
    artifact = gguf.run(model, config, folder)
    tokenizer = load_tokenizer(model.path)
    pieces = pieces_of(tokenizer) if tokenizer.chat_template else None
    if pieces is not None and QUOTES in pieces.go():
        pieces = None
    if tokenizer.chat_template and pieces is None:
        console.notice("the chat template does more than Ollama's can say: the Modelfile has none, and Ollama looks for one that it knows")
    context = gguf.context_length(model)
    write_text(folder / MODELFILE, modelfile(model, artifact.files[0], tokenizer, pieces, gguf.end_tokens(model), context))
    return Artifact(folder, f"ollama {config.gguf_type}", artifact.files, artifact.facts)


def verify(artifact: Artifact, reference: Reference, config: ExportConfig) -> Measured:
    """See Exporter: of the GGUF file. Ollama itself is not started."""
    return gguf.verify(artifact, reference, config)


def pieces_of(tokenizer: Any) -> Pieces | None:
    """What the tokenizer's chat template writes around messages, without the token that Ollama puts first by itself."""
    plain, whole = tokenizer.encode("x", add_special_tokens=False), tokenizer.encode("x")
    first = tokenizer.bos_token if tokenizer.bos_token and whole[0] == tokenizer.bos_token_id != plain[0] else ""

    def render(messages: list[dict[str, str]], begins: bool) -> str:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begins)
        return text.removeprefix(first)

    return find_pieces(render, (TemplateError, ValueError, TypeError, KeyError))


def modelfile(model: ModelFolder, file: str, tokenizer: Any, pieces: Pieces | None, ends: list[int], context: int) -> str:
    """The text of the Modelfile for ``file``, whose answers end at the tokens ``ends``."""
    lines = [f"FROM ./{file}"]
    if pieces is not None:
        lines.append(f"TEMPLATE {_quoted(pieces.go())}")
        if pieces.default_system:
            lines.append(f"SYSTEM {_quoted(pieces.default_system)}")
    lines += [f"PARAMETER stop {json.dumps(tokenizer.convert_ids_to_tokens(end), ensure_ascii=False)}" for end in ends]
    lines.append(f"PARAMETER num_ctx {min(context, CONTEXT)}")
    said = generation(model.path)
    if said.get("do_sample") is False:
        said |= {"temperature": 0}
    lines += [f"PARAMETER {name} {said[key]:g}" for name, key in PARAMETERS.items() if said.get(key) is not None]
    if licence := _licence(model):
        lines.append(f"LICENSE {_quoted(licence)}")
    return "\n".join(lines) + "\n"


def _licence(model: ModelFolder) -> str | None:
    """The text of the licence if the model brings it, or else its name."""
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        file = model.path / name
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace").strip()
    return licence_of(model.path)


def _quoted(text: str) -> str:
    """``text`` between three quotes, which it may then not hold itself."""
    return f'"""{text.replace(QUOTES, chr(39) * 3)}"""'
