"""swift chat: a conversation in the terminal."""

import sys
from dataclasses import replace
from typing import Any

from swift import console
from swift.config.commands import ChatConfig
from swift.data.records import Message
from swift.engine.answers import pieces
from swift.engine.base import Engine, Request
from swift.engine.load import make_engine, sampling, source_of
from swift.engine.media import text_prompt
from swift.engine.source import Source
from swift.errors import DataError
from swift.model.template import read_system

HELP = "commands: /clear starts anew, /system TEXT sets the system message, /multi reads lines up to a single '.', /exit leaves"


def run_chat(config: ChatConfig) -> None:
    """Load the model and talk."""
    converse(source_of(config), system=read_system(config.system))


def converse(source: Source, *, system: str | None) -> None:
    """Read questions from standard input until it ends; answers stream to standard output.

    Ctrl-C stops an answer, not the conversation; what was said so far stays.
    """
    config = source.config
    engine = make_engine(source)
    is_terminal = sys.stdin.isatty()
    console.say(f"{config.adapters[0] if config.adapters else config.model} on {source.place}; /help lists commands, Ctrl-D leaves")
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
            prompt = text_prompt(source, messages, use_chat_template=_has_template(source))
            answer = _speak(config, engine, prompt, number=len(messages))
        except DataError as problem:
            messages.pop()
            console.error(problem)
            continue
        messages.append(Message(role="assistant", content=answer))


def _has_template(source: Source) -> bool:
    return getattr(source.config, "use_chat_template", None) is not False and source.tokenizer.chat_template is not None


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


def _speak(config: Any, engine: Engine, prompt: list[int], *, number: int) -> str:
    said = []
    request = Request(id="chat", prompt=tuple(prompt), sampling=replace(sampling(config), seed=config.seed + number))
    answer = pieces(engine, request)
    try:
        for piece in answer:
            said.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        answer.close()
        sys.stdout.write(" [stopped]")
    print(flush=True)
    return "".join(said)
