"""A tokenizer in the keys of a GGUF file, checked on a text before anything is written.

Runtimes rebuild the tokenizer from these keys: byte-level BPE by its merges and the name of a way to split text, which is
found by trying llama.cpp's ways; SentencePiece by scores, from which the same algorithm as llama.cpp's must give the same ids.
"""

import heapq
import json
import re
from dataclasses import dataclass
from typing import Any

from swift.errors import ModelError
from swift.hub.gguf_splits import pre_tokenizer, splits

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type of llama.h
SPACE = "\u2581"  # how SentencePiece writes a space
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# Contractions, numbers, blanks, line ends, letters with and without case, marks, signs and code: where ways to split differ.
TEXT = (
    "Hello world! I'm sure they'RE here, we'Ve seen 'IT'LL' and don't ask.  Two  blanks,   three\t"
    "and a tab\t\tor two.\n\n\n1 22 333 4444 55555 1234567 3.14 1,000,000 x2y3 2nd v1.0.2 ٣٤ ½\n \n  \n\r\n\t"
    "tail \r\nfor (int i=0; i<10; ++i) { a[i] += b->c[i]; } // ok?!... ===>>> <<>> $%^&* #tag @you "
    '_x__y `q` "z" c:\\dir /usr/bin\n今天天气很好，我想去公园。价格100元！ こんにちはカタカナ 한국어 Привет, Мир! Ελλάδα العربية '
    "עברית हिन\u094dदी ไทย naïve CaFÉ İstanbul ÜBER straße ǅ 🙂🚀 👩\u200d💻 … — “quote” \u00a0nbsp e\u0300x camelCaseWORD "
    "HTMLParser"
)


@dataclass(frozen=True)
class Vocabulary:
    """``keys`` are whole keys of the file; ``warning`` says what a runtime may do otherwise."""

    keys: dict[str, Any]
    warning: str | None = None


def vocabulary(tokenizer: Any, size: int, ends: list[int]) -> Vocabulary:
    """Keys for a model whose embedding has ``size`` rows and whose answers end at the tokens ``ends``.

    ModelError for a tokenizer that has more tokens, or of a kind that cannot be expressed.
    """
    if len(tokenizer) > size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {size} rows",
            hint="the tokenizer belongs to another model, or tokens were added without resizing the embedding",
        )
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = core["model"].get("type")
    is_byte_level = kind == "BPE" and '"ByteLevel"' in json.dumps(core.get("pre_tokenizer"))
    if kind != "BPE" or not (is_byte_level or core["model"].get("byte_fallback")):
        what = "BPE without bytes for what it does not know" if kind == "BPE" else str(kind)
        raise ModelError(
            f"a tokenizer of this kind ({what}) has no form in GGUF files", hint="byte-level BPE and SentencePiece BPE have one"
        )
    tokens, types = _tokens(core, size, respells=not is_byte_level)
    keys: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    keys |= _ends(tokenizer, ends)
    if is_byte_level:
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in core["model"]["merges"]]
        pre, warning = _split(tokenizer, core)
        keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
        return Vocabulary(keys, warning)
    scores = _scores(core, tokens, types)
    begins = tokenizer.convert_ids_to_tokens(tokenizer.encode("x", add_special_tokens=False))[0].startswith(SPACE)
    keys |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores}
    keys["tokenizer.ggml.add_space_prefix"] = begins
    return Vocabulary(keys, _difference(tokenizer, sentencepiece_ids(TEXT, tokens, types, scores, begins), "SentencePiece"))


def _tokens(core: dict[str, Any], size: int, *, respells: bool) -> tuple[list[str], list[int]]:
    """Texts and types of all ``size`` tokens; the model may have more rows than there are tokens."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    for token, number in core["model"]["vocab"].items():
        tokens[number] = token
        types[number] = BYTE if respells and BYTE_PIECE.fullmatch(token) else NORMAL
    for entry in core["added_tokens"]:
        number, text = entry["id"], entry["content"]
        types[number] = CONTROL if entry["special"] else USER_DEFINED
        tokens[number] = text.replace(SPACE, " ") if respells and not entry["special"] else text
    unknown = core["model"].get("unk_token")
    if respells and unknown in core["model"]["vocab"]:
        types[core["model"]["vocab"][unknown]] = UNKNOWN
    if len(set(tokens)) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if token in tokens[:number])
        raise ModelError(f"two tokens have the text {twice!r}, which GGUF files cannot express")
    return tokens, types


def _ends(tokenizer: Any, ends: list[int]) -> dict[str, Any]:
    """Ids of special tokens, what is added around a text, and the chat template."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "mask": "mask"}  # as gguf spells it
    found: dict[str, Any] = {}
    for key, name in names.items():
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = int(number)
    further = [number for number in ends if number != tokenizer.eos_token_id]
    if further:
        found["tokenizer.ggml.eot_token_id"] = further[0]
    plain, whole = tokenizer.encode("x", add_special_tokens=False), tokenizer.encode("x")
    found["tokenizer.ggml.add_bos_token"] = bool(tokenizer.bos_token_id is not None and whole[0] == tokenizer.bos_token_id != plain[0])
    found["tokenizer.ggml.add_eos_token"] = bool(whole[-1] == tokenizer.eos_token_id != plain[-1])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        found |= {f"tokenizer.chat_template.{name}": text for name, text in template.items() if name != "default"}
        found["tokenizer.chat_templates"] = [name for name in template if name != "default"]
        template = template.get("default")
    if template:
        found["tokenizer.chat_template"] = template
    return found


def _split(tokenizer: Any, core: dict[str, Any]) -> tuple[str, str | None]:
    """The name of the way to split, and a warning if it is only nearly the tokenizer's own. ModelError if no way gives its ids."""
    own = _pieces(tokenizer.backend_tokenizer.pre_tokenizer)
    rule = bool(core["model"].get("ignore_merges"))
    ways = sorted(splits(), key=lambda way: (_pieces(pre_tokenizer(way)) != own, way["ignore_merges"] != rule))
    wanted = tokenizer.encode(TEXT, add_special_tokens=False)
    for way in ways:
        if _read_back(core, way) != wanted:
            continue
        if _pieces(pre_tokenizer(way)) == own and way["ignore_merges"] == rule:
            return str(way["pre"]), None
        return str(way["pre"]), f"the tokenizer splits text nearly as {way['pre']} does: llama.cpp may see other tokens in unusual text"
    raise ModelError(
        "the tokenizer splits text in a way that llama.cpp does not have: its runtimes would see other tokens",
        hint="--to openvino keeps any tokenizer",
    )


def _pieces(pre: Any) -> list[str]:
    return [piece for piece, _ in pre.pre_tokenize_str(TEXT)]


def _read_back(core: dict[str, Any], way: dict[str, Any]) -> list[int]:
    """Ids of the text by what a runtime makes of the file: same tokens and merges, no normalizer, text split as ``way`` says."""
    from tokenizers import Tokenizer

    model = core["model"] | {"ignore_merges": way["ignore_merges"]}
    tried = Tokenizer.from_str(json.dumps(core | {"pre_tokenizer": None, "normalizer": None, "model": model}))
    tried.pre_tokenizer = pre_tokenizer(way)
    found: list[int] = tried.encode(TEXT, add_special_tokens=False).ids
    return found


def _scores(core: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """SentencePiece merges what has the highest score; so a piece has minus the rank of the merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(core["model"]["merges"]):
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(first + second, rank)
    last = len(core["model"]["merges"])
    return [float(-ranks.get(token, last)) if kind == NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)]


def sentencepiece_ids(text: str, tokens: list[str], types: list[int], scores: list[float], begins_with_space: bool) -> list[int]:
    """What llama.cpp makes of ``text`` (its llm_tokenizer_spm): user-defined tokens first, then merges, the best score first."""
    numbers = {token: number for number, token in enumerate(tokens)}
    whole = sorted((token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, whole))})", text) if whole else [text]
    found: list[int] = []
    for place, part in enumerate(parts):
        if place % 2:
            found.append(numbers[part])
        elif part:
            begins = begins_with_space and place == 0
            found += _merged((" " * begins + part).replace(" ", SPACE), numbers, scores)
    return found


def _merged(text: str, numbers: dict[str, int], scores: list[float]) -> list[int]:
    parts: list[str] = list(text)
    after = [*range(1, len(parts)), -1]
    before = list(range(-1, len(parts) - 1))
    queue: list[tuple[float, int, str]] = []

    def offer(left: int) -> None:
        if left >= 0 and after[left] >= 0:
            pair = parts[left] + parts[after[left]]
            if pair in numbers:
                heapq.heappush(queue, (-scores[numbers[pair]], left, pair))

    for left in range(len(parts) - 1):
        offer(left)
    while queue:
        _, left, pair = heapq.heappop(queue)
        right = after[left]
        if not parts[left] or right < 0 or parts[left] + parts[right] != pair:
            continue  # one of them was merged with another in the meantime
        parts[left], parts[right] = pair, ""
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
        offer(before[left])
        offer(left)
    found: list[int] = []
    for part in filter(None, parts):
        found += [numbers[part]] if part in numbers else [numbers.get(f"<0x{byte:02X}>", 0) for byte in part.encode()]
    return found


def _difference(tokenizer: Any, found: list[int], what: str) -> str | None:
    """A warning with the first place where ``found`` departs from what the tokenizer makes of the text."""
    wanted = tokenizer.encode(TEXT, add_special_tokens=False)
    if found == wanted:
        return None
    place = next((place for place, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))
    shown = tokenizer.decode(wanted[max(place - 2, 0) : place + 3])
    return f"read as {what}, the tokenizer gives other tokens in unusual text, the first near {shown!r}"
