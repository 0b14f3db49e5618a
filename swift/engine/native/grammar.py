"""Grammars as llguidance reads them. Imports nothing heavy."""

import json
from typing import Any

from swift.engine.base import Grammar


def library_text(grammar: Grammar, matcher: Any) -> str:
    """The text for ``matcher``, which is llguidance's LLMatcher. Raises its ValueError for what cannot be read."""
    if grammar.kind == "json_schema":
        return str(matcher.grammar_from_json_schema(grammar.text))
    if grammar.kind == "regex":
        return str(matcher.grammar_from_regex(grammar.text))
    if grammar.kind == "choice":
        words = " | ".join(json.dumps(word) for word in json.loads(grammar.text))
        return str(matcher.grammar_from_lark(f"start: {words}"))
    return str(matcher.grammar_from_lark(grammar.text))
