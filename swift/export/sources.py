"""What lies around the weights in a model's folder, and goes with them."""

import shutil
from pathlib import Path

from swift.model.artifact import ModelFolder

NAMES = ("config.json", "generation_config.json", "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
BEGINNINGS = ("tokenizer", "special_tokens", "LICENSE", "LICENCE", "NOTICE")


def copy_around(model: ModelFolder, folder: Path) -> None:
    """Copy configuration, tokenizer, chat template and licence of ``model`` into ``folder``."""
    for file in sorted(model.path.iterdir()):
        if file.is_file() and (file.name in NAMES or file.name.startswith(BEGINNINGS) or file.suffix in (".model", ".tiktoken")):
            shutil.copyfile(file, folder / file.name)
