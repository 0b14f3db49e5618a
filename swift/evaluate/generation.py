"""How answers to a task are written: the declaration, then what --eval_generation_config and the options of generation say."""

from collections.abc import Mapping
from typing import Any

from swift.engine.base import Sampling
from swift.errors import ConfigError, near
from swift.evaluate.spec import Writing

# Names of --eval_generation_config: ours, and those of EvalScope and OpenAI for the same.
_NAMES = {
    "max_new_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop_words": "stop_words",
    "stop": "stop_words",
    "stop_seqs": "stop_words",
}
_OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")


def sampling_of(mode: Writing, config: Any, is_chat: bool) -> Sampling:
    """Greedy unless the user says otherwise; do_sample alone samples as the model's generation_config says.

    An option is stronger than --eval_generation_config, that than the declaration.
    With a chat template, stop words of the declaration that begin with a line break are left out (see ``generated``).
    ``config`` is a TasksConfig, of which those of an EvalConfig generate by options; None is none.
    """
    stop = tuple(word for word in mode.stop if not (is_chat and word.startswith("\n")))
    said: dict[str, Any] = {"max_new_tokens": mode.max_new_tokens, "stop_words": stop}
    given = getattr(config, "eval_generation_config", None) or {}
    said |= _given(given, stop)
    for name in _OPTIONS:
        if getattr(config, name, None) is not None:
            said[name] = getattr(config, name)
    if words := getattr(config, "stop_words", None):
        said["stop_words"] = (*stop, *words)
    temperature = said.get("temperature")
    is_sampled = given.get("do_sample") or any(said.get(name) is not None for name in ("temperature", "top_k", "top_p"))
    if temperature == 0 or not is_sampled:
        said["temperature"] = 0.0
    elif "seed" not in said:
        said["seed"] = getattr(config, "seed", 42)
    return Sampling(**said)


def _given(given: Mapping[str, Any], stop: tuple[str, ...]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for name, value in given.items():
        if name == "do_sample":
            if not isinstance(value, bool):
                raise ConfigError(f"--eval_generation_config: do_sample is {value!r}", hint="give true or false")
            if not value:
                said["temperature"] = 0.0
        elif name not in _NAMES:
            match = near(name, [*_NAMES, "do_sample"])
            hint = f"did you mean {match!r}?" if match else f"known: {', '.join(_NAMES)}"
            raise ConfigError(f"--eval_generation_config: unknown setting {name!r}", hint=hint)
        elif _NAMES[name] == "stop_words":
            words = [value] if isinstance(value, str) else value
            if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
                raise ConfigError(f"--eval_generation_config: {name} is {value!r}, not a list of texts")
            said["stop_words"] = (*stop, *words)
        else:
            said[_NAMES[name]] = _number(name, value)
    return said


def _number(name: str, value: Any) -> int | float:
    is_whole = _NAMES[name] in ("max_new_tokens", "top_k", "seed")
    kinds = (int,) if is_whole else (int, float)
    least = 1 if _NAMES[name] == "max_new_tokens" else -2 if _NAMES[name] in ("presence_penalty", "frequency_penalty") else 0
    if not isinstance(value, kinds) or isinstance(value, bool) or value < least:
        raise ConfigError(
            f"--eval_generation_config: {name} is {value!r}", hint=f"give a {'whole ' if is_whole else ''}number from {least} on"
        )
    return value
