"""Completion scripts for shells, from the same declarations as the flags."""

import argparse
from collections.abc import Mapping
from importlib import import_module

from swift import deps
from swift.config.flags import make_parser
from swift.errors import ConfigError

SHELLS = ("bash", "zsh", "tcsh")


def script(shell: str, commands: Mapping[str, tuple[str, str, str]]) -> str:
    """The text that ``shell`` should evaluate: eval "$(swift completion bash)"."""
    if shell not in SHELLS:
        raise ConfigError(f"no completion for {shell!r}", hint=f"choose from: {', '.join(SHELLS)}")
    shtab = deps.require("shtab", extra="completion")
    return str(shtab.complete(whole_parser(commands), shell=shell))


def whole_parser(commands: Mapping[str, tuple[str, str, str]]) -> argparse.ArgumentParser:
    """One parser with every command as a subparser."""
    root = argparse.ArgumentParser(prog="swift")
    children = root.add_subparsers()
    families: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    for name, (class_name, _, summary) in commands.items():
        module = "swift.config.options" if class_name == "Config" else "swift.config.commands"
        parser = make_parser(getattr(import_module(module), class_name), name, summary)
        head, _, tail = name.partition(" ")
        place = children
        if tail:
            if head not in families:
                families[head] = children.add_parser(head, help=f"{head} commands").add_subparsers()
            place = families[head]
        place.add_parser(tail or head, parents=[parser], add_help=False, conflict_handler="resolve", help=summary)
    return root
