"""Grammars are compiled in a process of their own before the engine does it, since a short one may take minutes and gigabytes.

Run as a program it is that process: lines of JSON in, [kind, text], and one line out for each when it is compiled.
"""

import asyncio
import json
import sys
from collections import OrderedDict
from contextlib import suppress
from importlib.util import find_spec

from swift.engine.base import Grammar
from swift.serve import limits
from swift.serve.errors import unsupported

KEPT = 256  # grammars that were found quick


class GrammarCheck:
    """Turns away grammars that would hold up the engine. What is wrong with them otherwise is the engine's to say."""

    def __init__(self) -> None:
        self._quick: OrderedDict[Grammar, None] = OrderedDict()
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def check(self, grammar: Grammar) -> None:
        """Raises ApiError for a grammar that is too long, or takes too much time or memory."""
        if find_spec("llguidance") is None:
            return  # the engine says so
        if len(grammar.text) > limits.MOST_GRAMMAR_BYTES:
            raise unsupported(f"the {grammar.kind} has more than {limits.MOST_GRAMMAR_BYTES} characters")
        async with self._turn:
            if grammar not in self._quick and not await self._is_quick(grammar):
                problem = f"the {grammar.kind} takes too long to compile ({limits.GRAMMAR_TIMEOUT_S:g} s), or too much memory"
                raise unsupported(f"{problem}: make it simpler")
            self._quick[grammar] = None
            self._quick.move_to_end(grammar)
            if len(self._quick) > KEPT:
                self._quick.popitem(last=False)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            self._process = None

    async def _is_quick(self, grammar: Grammar) -> bool:
        process = await self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([grammar.kind, grammar.text]).encode() + b"\n")
            async with asyncio.timeout(limits.GRAMMAR_TIMEOUT_S):
                await process.stdin.drain()
                if await process.stdout.readline():
                    return True
        except (TimeoutError, OSError):
            pass
        except BaseException:
            self.close()  # the client left: what it still says would be taken for another's
            raise
        self.close()
        return False

    async def _started(self) -> asyncio.subprocess.Process:
        """The process, ready for a grammar."""
        if self._process is None or self._process.returncode is not None:
            pipe = asyncio.subprocess.PIPE
            command = sys.executable, "-m", "swift.serve.grammars"
            self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, start_new_session=True)
            assert self._process.stdout is not None
            await self._process.stdout.readline()
        return self._process


def main() -> None:
    import resource

    from llguidance import LLMatcher, LLTokenizer

    from swift.engine.native.grammar import library_text

    resource.setrlimit(resource.RLIMIT_AS, (limits.GRAMMAR_MEMORY_BYTES, limits.GRAMMAR_MEMORY_BYTES))
    tokenizer = LLTokenizer("byte")
    print(flush=True)
    for line in sys.stdin:
        with suppress(ValueError):
            LLMatcher(tokenizer, library_text(Grammar(*json.loads(line)), LLMatcher), log_level=0)
        print(flush=True)


if __name__ == "__main__":
    main()
