"""How one task is to be asked: what the declaration says, what all tasks are told, and what ``--eval_dataset_args`` says of this one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from swift.config.evaluate import EvalConfig
from swift.errors import ConfigError, near
from swift.evaluate.spec import AnyMode, TaskSpec, find_task, names_of, normal
from swift.model.template import read_system

_SHARED = ("local_path", "dataset_id", "subset_list", "few_shot_num")
"""Keys of ``--eval_dataset_args`` that every task has, as EvalScope spells them; others are for the task's extractor or metrics."""

_OF_GENERATION = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop_words", "eval_generation_config")


@dataclass(frozen=True)
class Settings:
    """``arguments`` are those of ``--eval_dataset_args`` that are left for what judges written answers; ``hub`` those of ``resolve``."""

    mode: str
    num_fewshot: int
    use_chat_template: bool | None = None
    """None: where answers are written, if the model has a template."""
    system: str | None = None
    enable_thinking: bool | None = None
    limit: int | None = None
    data_dir: str | None = None
    local_path: str | None = None
    subsets: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    hub: Mapping[str, Any] = field(default_factory=dict)

    def mode_of(self, spec: TaskSpec) -> AnyMode:
        found: AnyMode = spec.modes[self.mode]
        return found

    def wants_chat(self, tokenizer: Any) -> bool:
        """Whether questions are asked with the chat template."""
        if self.mode == "perplexity":
            return False
        if self.use_chat_template is None:
            return self.mode == "generate" and bool(getattr(tokenizer, "chat_template", None))
        return self.use_chat_template


def settings_of(spec: TaskSpec, config: Any) -> Settings:
    """Of a TasksConfig, and of an EvalConfig's options for chat and hub where it has them. ConfigError names the option that is wrong."""
    given = _arguments(spec, config)
    first = "generate" if getattr(config, "eval_url", None) and "generate" in spec.modes else next(iter(spec.modes))
    mode = config.eval_mode or first
    if mode not in spec.modes:
        raise ConfigError(f"task {spec.name} has no mode {mode}", hint=f"it has: {', '.join(spec.modes)}")
    arguments = {name: value for name, value in given.items() if name not in _SHARED}
    if arguments and mode != "generate":
        raise ConfigError(
            f"--eval_dataset_args: {', '.join(arguments)} of {spec.name} has no effect in mode {mode}",
            hint=f"known there: {', '.join(_SHARED)}",
        )
    return Settings(
        mode=mode,
        num_fewshot=_shots(spec, mode, given, config.eval_num_fewshot),
        use_chat_template=getattr(config, "use_chat_template", None),
        system=read_system(getattr(config, "system", None)),
        enable_thinking=getattr(config, "enable_thinking", None),
        limit=config.eval_limit,
        data_dir=config.eval_data_dir,
        local_path=_text(spec, given, "local_path") or _text(spec, given, "dataset_id"),
        subsets=_subsets(spec, given.get("subset_list")),
        arguments=arguments,
        hub={
            "use_hf": getattr(config, "use_hf", None),
            "token": getattr(config, "hub_token", None),
            "offline": getattr(config, "offline", False),
        },
    )


def refuse_without_effect(config: EvalConfig, tokenizer: Any) -> None:
    """ConfigError for an option of chat or of generation that none of the tasks reads. ``tokenizer`` is None for a server's model."""
    specs = [find_task(name) for name in config.eval_dataset]
    if any(spec.python is not None for spec in specs):
        return
    asked = [settings_of(spec, config) for spec in specs]
    if all(settings.mode != "generate" for settings in asked):
        config.refuse_without_effect(_OF_GENERATION, "where no answers are written")
    if all(settings.mode == "perplexity" for settings in asked):
        config.refuse_without_effect(("use_chat_template", "system", "enable_thinking"), "on the perplexity of texts")
    elif tokenizer is not None and not any(settings.wants_chat(tokenizer) for settings in asked):
        because = "without the chat template: say --use_chat_template true, if the model has one"
        config.refuse_without_effect(("system", "enable_thinking"), because)


def _arguments(spec: TaskSpec, config: Any) -> dict[str, Any]:
    """What --eval_dataset_args says of this task, by its name or an alias. ConfigError for a task that is not asked."""
    names = names_of(spec)
    asked = [find_task(name) for name in config.eval_dataset]
    if [one.name for one in asked].count(spec.name) > 1:
        raise ConfigError(
            f"--eval_dataset: task {spec.name} is named twice", hint="name each task once, and give your own names of their own"
        )
    others = names.union(*map(names_of, asked))
    found: dict[str, Any] = {}
    for name, value in (config.eval_dataset_args or {}).items():
        if normal(name) not in others:
            meant = near(normal(name), others)
            hint = f"did you mean {meant!r}?" if meant else "remove it, or name the task in --eval_dataset"
            raise ConfigError(f"--eval_dataset_args: {name!r} is no task that is asked", hint=hint)
        if normal(name) in names:
            if not isinstance(value, dict):
                raise ConfigError(f"--eval_dataset_args: {name} is {value!r}, not an object", hint='write {"mmlu": {"few_shot_num": 5}}')
            found |= value
    if (match := _misspelt(found)) is not None:
        raise ConfigError(f"--eval_dataset_args: {spec.name} has no setting {match[0]!r}", hint=f"did you mean {match[1]!r}?")
    return found


def _misspelt(found: Mapping[str, Any]) -> tuple[str, str] | None:
    """A setting that looks like a shared one, with what was meant."""
    for name in found:
        if name not in _SHARED and (match := near(name, _SHARED)) is not None:
            return name, match
    return None


def _shots(spec: TaskSpec, mode: str, given: Mapping[str, Any], wanted: int | None) -> int:
    count = given.get("few_shot_num", wanted)
    if count is None:
        return 0 if mode == "perplexity" else spec.shots.count
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ConfigError(f"--eval_dataset_args: few_shot_num of {spec.name} is {count!r}", hint="give a whole number from 0 on")
    if count and mode == "perplexity":
        raise ConfigError(f"--eval_num_fewshot {count} has no effect on {spec.name}: text has no solved examples", hint="leave it out")
    if count and spec.shots.split is None and count > len(spec.shots.rows):
        most = len(spec.shots.rows)
        raise ConfigError(f"task {spec.name} has {most} solved examples, not {count}", hint=f"give --eval_num_fewshot 0 to {most}")
    return count


def _text(spec: TaskSpec, given: Mapping[str, Any], name: str) -> str | None:
    found = given.get(name)
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"--eval_dataset_args: {name} of {spec.name} is {found!r}, not a text", hint="name a folder or a file")
    return found


def _subsets(spec: TaskSpec, given: Any) -> tuple[str, ...]:
    """The categories and groups that are wanted. ConfigError for one that the declaration does not know."""
    if given is None:
        return ()
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"--eval_dataset_args: subset_list of {spec.name} is {given!r}", hint='write ["astronomy", "law"]')
    known = [*spec.category_names, *spec.groups]
    for name in given:
        if known and name not in known:
            match = near(name, known)
            hint = f"did you mean {match!r}?" if match else f"known groups: {', '.join(spec.groups)}"
            raise ConfigError(f"task {spec.name} has no subject {name!r}", hint=hint)
    return tuple(dict.fromkeys(given))
