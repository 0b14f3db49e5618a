"""How an exported model is loaded and served: what the card says, by format."""

from swift.config.export import ExportConfig
from swift.model.artifact import Artifact

_NEEDS = {
    "gptq": "gptqmodel",
    "gptq_v2": "gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "bnb": "bitsandbytes",
}


def usage(config: ExportConfig, artifact: Artifact | None, *, name: str) -> str:
    """Markdown; ``name`` is the id on a hub, or the folder. An exporter may say it itself: ``facts["usage"]``, with {name} in it."""
    if artifact is not None and "usage" in artifact.facts:
        return str(artifact.facts["usage"]).replace("{name}", name)
    if config.to is None:
        return _transformers(config, name)
    first = artifact.files[0] if artifact is not None else ""
    commands = {
        "gguf": f"llama-server -m {first}\nswift deploy --model {first}",
        "ollama": f"ollama create {name.rpartition('/')[2]} -f Modelfile\nollama run {name.rpartition('/')[2]}",
    }
    if command := commands.get(config.to):
        return _code("bash", command)
    files = ", ".join(f"`{file}`" for file in artifact.files) if artifact is not None else ""
    return f"The files of `{name}` are in the format {config.to}; the weights are in {files}.\n"


def _transformers(config: ExportConfig, name: str) -> str:
    package = _NEEDS.get(config.quant_format or "")
    before = f"transformers needs the package {package} to read it: `pip install {package}`.\n\n" if package else ""
    python = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}")'
    )
    return f"{before}{_code('python', python)}\n{_code('bash', f'swift deploy --model {name}{chr(10)}vllm serve {name}')}"


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```\n"
