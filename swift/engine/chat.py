"""swift chat: a conversation in the terminal."""

import sys
from typing import Any

import torch

from swift import console
from swift.config.commands import ChatConfig
from swift.data.records import Message
from swift.data.render import render_prompt
from swift.engine.load import load_for_inference, sampling
from swift.engine.text import stream
from swift.errors import DataError
from swift.model.load import Loaded
from swift.model.template import read_system

HELP = "commands: /clear starts anew, /system TEXT sets the system message, /multi reads lines up to a single '.', /exit leaves"


def run_chat(config: ChatConfig) -> None:
    """Load the model and talk."""
    converse(config, load_for_inference(config), system=read_system(config.system))


def converse(config: Any, loaded: Loaded, *, system: str | None) -> None:
    """Read questions from standard input until it ends; answers stream to standard output.

    Ctrl-C stops an answer, not the conversation; what was said so far stays.
    """
    torch.manual_seed(config.seed)
    is_terminal = sys.stdin.isatty()
    console.say(f"{config.adapters[0] if config.adapters else config.model} on {loaded.device}; /help lists commands, Ctrl-D leaves")
    messages = _start(system)
    while True:
        try:
            question = _read(is_terminal)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question.startswith("/"):
            if question in ("/exit", "/quit"):
                return
            messages = _command(question, messages)
            continue
        if not question.strip():
            continue
        messages.append(Message(role="user", content=question))
        try:
            prompt = render_prompt(
                messages, loaded.tokenizer, enable_thinking=config.enable_thinking, use_chat_template=_has_template(config, loaded)
            )
            answer = _speak(config, loaded, prompt)
        except DataError as problem:
            messages.pop()
            console.error(problem)
            continue
        messages.append(Message(role="assistant", content=answer))


def _has_template(config: Any, loaded: Loaded) -> bool:
    return getattr(config, "use_chat_template", None) is not False and loaded.tokenizer.chat_template is not None


def _start(system: str | None) -> list[Message]:
    return [Message(role="system", content=system)] if system else []


def _read(is_terminal: bool) -> str:
    line = input("\x1b[1myou>\x1b[0m " if is_terminal else "")
    if line.strip() != "/multi":
        return line
    lines = []
    while (line := input()) != ".":
        lines.append(line)
    return "\n".join(lines)


def _command(text: str, messages: list[Message]) -> list[Message]:
    word, _, rest = text.partition(" ")
    if word == "/clear":
        console.say("a new conversation")
        return [message for message in messages if message.role == "system"]
    if word == "/system":
        console.say("a new conversation with this system message" if rest else "a new conversation without a system message")
        return _start(rest.strip() or None)
    console.say(HELP if word == "/help" else f"unknown command {word}; {HELP}")
    return messages


def _speak(config: Any, loaded: Loaded, prompt: list[int]) -> str:
    pieces = []
    answer = stream(loaded.model, loaded.tokenizer, prompt, sampling(config))
    try:
        for piece in answer:
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]
        sys.stdout.write(" [stopped]")
    print(flush=True)
    return "".join(pieces)
