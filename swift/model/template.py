"""Texts that options name: the system message and the chat template."""

from pathlib import Path

from swift.errors import ConfigError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BUILT_IN = {"chatml": CHATML}


def read_template(value: str | None) -> str | None:
    """The Jinja text that ``--chat_template`` names: a built-in name, a file, or the text itself."""
    if value is None or value in BUILT_IN:
        return BUILT_IN.get(value or "")
    if "{%" in value or "{{" in value:
        return value
    return _read(value, "chat_template", f"built-in names: {', '.join(BUILT_IN)}")


def read_system(value: str | None) -> str | None:
    """The system message: the text of a .txt file, or ``value`` itself."""
    if value is not None and value.endswith(".txt"):
        return _read(value, "system", "a text that is no file name works too")
    return value


def _read(path: str, option: str, hint: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"--{option} {path} cannot be read: {problem}", hint=hint) from None
