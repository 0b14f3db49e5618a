"""Texts to token ids for scoring, cut exactly as lm-eval 0.4.13 cuts them, so that equal models give equal numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from swift.engine.scoring import Text
from swift.errors import DataError, ModelError
from swift.evaluate.prompt import Prompt


class Encoder:
    """A tokenizer, and the token that stands before a text that has nothing before it: the beginning of a sequence, else its end."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        first = self.tokenizer.bos_token_id
        if first is None:
            first = self.tokenizer.eos_token_id
        if first is None:
            raise ModelError("the tokenizer has neither a token that begins texts nor one that ends them", hint="set eos_token")
        self.first = int(first)
        self._first_text = str(self.tokenizer.decode([self.first]))

    def many(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """The ids of each text, with the special tokens that the tokenizer adds, unless a text begins with the first one itself."""
        found: list[list[int]] = [[]] * len(texts)
        for add in (True, False):
            chosen = [index for index, text in enumerate(texts) if (special and not text.startswith(self._first_text)) == add]
            if chosen:
                ids = self.tokenizer([texts[index] for index in chosen], add_special_tokens=add, verbose=False)["input_ids"]
                for index, one in zip(chosen, ids, strict=True):
                    found[index] = list(one)
        return found

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        return self.many([text], special=special)[0]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[Text], int]:
        """(context, continuation) -> their tokens, of which those of the continuation are scored, and how many are joined at the seam.

        Both are tokenized together; spaces at the end of the context count as the beginning of the continuation. Scored are the
        tokens of both together beyond as many as the context alone has, after the tokens of the context alone. Where the tokenizer
        joins what stands on either side of the seam, the continuation loses its beginning by that, as it does in lm-eval; if it
        loses all (lm-eval stops there), its own tokens are scored. After an empty context stands ``first``.
        DataError for a continuation without text.
        """
        moved = [_with_spaces_moved(*pair) for pair in pairs]
        contexts = list(dict.fromkeys(context for context, _ in moved if context))
        heads = dict(zip(contexts, self.many(contexts), strict=True)) if contexts else {}
        wholes = iter(self.many([context + continuation for context, continuation in moved if context]))
        texts, num_joined = [], 0
        for context, continuation in moved:
            if context:
                head, whole = heads[context], next(wholes)
                num_joined += whole[: len(head)] != head
                tokens, start = [*head, *(whole[len(head) :] or self.ids(continuation, special=False))], len(head)
            else:
                tokens, start = self._alone(continuation), 1
            if not 1 <= start < len(tokens):
                raise DataError(f"{continuation!r} has no token after the question", hint="a choice needs a text")
            texts.append(Text(tuple(tokens), start))
        return texts, num_joined

    def _alone(self, continuation: str) -> list[int]:
        tokens = self.ids(continuation, special=False)
        return tokens if tokens and tokens[0] == self.first else [self.first, *tokens]

    def document(self, text: str, most: int) -> list[Text]:
        """``text`` in windows of at most ``most`` computed tokens: each token is scored in one of them.

        Windows do not overlap, but that the first token scored in one has the token before it, and that the last window reaches
        back as far as it can. A token that the tokenizer puts before every text is not scored.
        """
        tokens = self.ids(text)
        tokens = tokens[1:] if tokens[:1] == [self.first] else tokens
        if not tokens:
            raise DataError("the text is empty: there is nothing to score")
        whole = [self.first, *tokens]
        windows = [Text(tuple(whole[: most + 1]), 1)]
        done = most + 1
        while done < len(whole):
            end = min(done + most, len(whole))
            begin = end - most - 1
            windows.append(Text(tuple(whole[begin:end]), done - begin))
            done = end
        return windows


def _with_spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


@dataclass(frozen=True)
class Fitted:
    """Texts that fit the model, of the prompt that they were made of; ``notes`` say what was left out for that."""

    texts: tuple[Text, ...]
    prompt: Prompt
    notes: dict[str, Any] = field(default_factory=dict)


def fitted(prompt: Prompt, most: int, encode: Callable[[Prompt], list[Text]]) -> Fitted:
    """The texts of ``prompt``, each with at most ``most`` tokens to compute: the last token of a text is not computed.

    Solved examples are left out from the first on, and then the beginning of the text is cut off. DataError for a continuation
    that alone is too long.
    """
    texts = encode(prompt)
    all_shots = len(prompt.shots)
    while prompt.shots and _longest(texts) > most:
        prompt = prompt.without_first_shot()
        texts = encode(prompt)
    notes: dict[str, Any] = {}
    if len(prompt.shots) < all_shots:
        notes["shots_left_out"] = all_shots - len(prompt.shots)
    if (over := _longest(texts) - most) > 0:
        notes["truncated"] = over
        texts = [cut(text, most) for text in texts]
    return Fitted(tuple(texts), prompt, notes)


def cut(text: Text, most: int) -> Text:
    """``text`` without so many tokens of its beginning that ``most`` are computed; its scored tokens stay."""
    over = len(text.tokens) - 1 - most
    if over <= 0:
        return text
    if over >= text.start:
        scored = len(text.tokens) - text.start
        raise DataError(
            f"the text to score has {scored} tokens, the model reads {most}", hint="give a larger --max_model_len, if the model has one"
        )
    return Text(text.tokens[over:], text.start - over)


def _longest(texts: Sequence[Text]) -> int:
    return max(len(text.tokens) for text in texts) - 1
