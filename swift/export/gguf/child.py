"""llama.cpp in a process of its own, since it ends the process where it meets what it did not expect.

This module is also the program of that process. It reads one JSON object a line and answers each with one; logits follow
as raw float32.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from swift.errors import DependencyError, ModelError

_PROGRAM = (sys.executable, "-P", __file__)  # by its path: the package's other modules are slow to import


class LlamaCpp:
    """A model in llama.cpp."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
        self._process, self._log = process, log
        hello = self._receive()
        self.version, self.vocabulary = str(hello["version"]), int(hello["vocabulary"])

    def logits(self, ids: list[int]) -> Any:
        """(T, V) in float32."""
        import numpy as np

        self._send({"ids": ids})
        self._receive()
        assert self._process.stdout is not None
        size = 4 * len(ids) * self.vocabulary
        data = self._process.stdout.read(size)
        if len(data) != size:
            raise self._ended()
        return np.frombuffer(data, dtype=np.float32).reshape(len(ids), self.vocabulary).copy()

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of ``text``; with ``special``, names of special tokens are these tokens."""
        self._send({"text": text, "special": special})
        return [int(number) for number in self._receive()["ids"]]

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(b"{"):
            raise self._ended()
        message: dict[str, Any] = json.loads(line)
        return message

    def _ended(self) -> ModelError:
        self._process.kill()
        self._process.wait()
        return ModelError(f"llama.cpp cannot read the file: {_told(self._log)}", hint="a newer llama-cpp-python may know more")


def is_installed() -> bool:
    """Whether llama-cpp-python can be imported."""
    return find_spec("llama_cpp") is not None


def require() -> None:
    """DependencyError if llama-cpp-python is absent."""
    if not is_installed():
        raise DependencyError("the package llama_cpp is not installed", hint="pip install 'swift-llm[llamacpp]'")


@contextmanager
def opened(file: Path, num_context: int) -> Iterator[LlamaCpp]:
    """The model in ``file``, for texts of up to ``num_context`` tokens. ModelError if llama.cpp cannot read it."""
    command = [*_PROGRAM, str(file), str(num_context)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=_environment())
        try:
            yield LlamaCpp(process, log)
        finally:
            process.kill()
            process.communicate()


def quantize(source: Path, target: Path, file_type: int, num_threads: int) -> None:
    """Write ``source`` as ``target`` in a number format of llama.cpp. ModelError if that fails."""
    command = [*_PROGRAM, str(source), str(target), str(file_type), str(num_threads)]
    with tempfile.TemporaryFile() as log:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment())
        if done.returncode != 0:
            raise ModelError(f"llama.cpp could not quantize the model: {_told(log)}")


def _told(log: IO[bytes]) -> str:
    """What llama.cpp said in the end: its line about an error, or its last."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "it gives no reason")


def _environment() -> dict[str, str]:
    """The program must find this package where the process that starts it did."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


def _serve(llama: Any, file: str, num_context: int) -> None:
    model = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(1)
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = num_context
    params.type_k = params.type_v = 0  # float32
    params.flash_attn_type = 0
    context = llama.llama_init_from_model(model, params)
    vocab = llama.llama_model_get_vocab(model)
    vocabulary = llama.llama_vocab_n_tokens(vocab)
    _answer({"version": version("llama-cpp-python"), "vocabulary": vocabulary})
    batch = llama.llama_batch_init(num_context, 0, 1)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        if "text" in asked:
            data = asked["text"].encode()
            room = (llama.llama_token * (len(data) + 8))()
            count = llama.llama_tokenize(vocab, data, len(data), room, len(room), True, asked["special"])
            _answer({"ids": list(room[:count])})
            continue
        ids = asked["ids"]
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, True
        if llama.llama_decode(context, batch) != 0:
            raise SystemExit("error: a pass failed")
        _answer({})
        sys.stdout.buffer.write(ctypes.string_at(llama.llama_get_logits(context), 4 * len(ids) * vocabulary))
        sys.stdout.buffer.flush()


def _answer(message: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


def _main(arguments: list[str]) -> None:
    llama: Any = import_module("llama_cpp")
    llama.llama_backend_init()
    if len(arguments) == 2:
        _serve(llama, arguments[0], int(arguments[1]))
        return
    source, target, file_type, num_threads = arguments
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(file_type), int(num_threads)
    raise SystemExit(int(llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))))


if __name__ == "__main__":
    _main(sys.argv[1:])
