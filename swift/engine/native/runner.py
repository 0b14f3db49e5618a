"""Forward passes of a model over a paged cache."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from swift.engine.native.adapters import Adapters
from swift.engine.native.compiled import kernels
from swift.engine.native.packed import Format, Packed, pack_model
from swift.engine.native.pages import Attention, PagedCache, Pages, Piece
from swift.engine.native.program import Program, program_of
from swift.engine.native.scheduler import Part, Pass
from swift.errors import ModelError
from swift.model.attention import NO_MASK_SHAPE, packed_inputs, use_packed_attention
from swift.model.layout import Layout
from swift.model.policy import Policy, evaluating, is_close, narrow_windows, probe_ids

# T tokens of the row, K places whose logits are wanted, V vocabulary


class Runner:
    """``model`` computes what the scheduler planned. Its weights are used as they are, or packed in ``weights``."""

    def __init__(self, model: Any, cache: PagedCache, weights: Format | Literal["auto"] | None = None) -> None:
        use_packed_attention(model)
        self.policy = Policy(model)
        self.cache = cache
        self.device = model.get_input_embeddings().weight.device
        self.adapters = Adapters(model)
        self.packed: Packed | None = None
        self.program: Program | None = None
        self.why_no_program = "torch's kernels compute"
        self._kernel: Any = None
        self.vision: Any = None  # of a model that reads images
        if weights is not None:
            self.pack(weights)

    def pack(self, weights: Format | Literal["auto"]) -> None:
        """Keep the weights in the format ``weights``: the model is taken apart for it."""
        model, head = self.policy.inner, self.policy.head
        self.packed = pack_model(model, weights)
        self._kernel = kernels().paged_attention
        if isinstance(head, Tensor):  # the weight itself, which the packed layer has in its place now
            self.policy.packed_head = model.get_output_embeddings()
        self.program, self.why_no_program = program_of(self.policy)

    @torch.inference_mode()
    def run(self, step: Pass) -> list[Tensor | None]:
        """For each part float32 logits (k, V): at its last token and the guessed ones after it, at all its tokens if the
        prompt's are wanted, None if nothing follows from it."""
        self.cache.copy(step.copies)
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        counts: list[int] = []
        pieces = []
        spans = []
        if self.vision is not None:
            self.adapters.use([], self.device)  # images are seen without one
        for part in step.parts:
            sequence, begin = part.sequence, len(tokens)
            spans.append((sequence.adapter, begin, begin + part.num_tokens))
            pieces.append(Piece(begin, part.num_tokens, part.end + part.num_draft, tuple(sequence.blocks)))
            tokens += sequence.tokens[part.begin : part.end]
            tokens += sequence.draft[: part.num_draft]
            shift = 0 if self.vision is None else self.vision.shift(part)
            positions += range(part.begin + shift, part.end + part.num_draft + shift)
            first = _first_wanted(part)
            counts.append(part.num_tokens - first)
            wanted += range(begin + first, begin + part.num_tokens)
        self.adapters.use(spans, self.device)
        pages = Pages(self.cache, pieces, self.device, self._kernel)
        rows_K = torch.tensor(wanted, dtype=torch.int64, device=self.device)
        ids, places = torch.tensor([tokens]), torch.tensor([positions])
        images = None if self.vision is None else self.vision.inputs(step.parts, ids, places)
        updates = None if self.program is None or images is not None else self.adapters.updates(self.program.linears)
        if self.program is not None and updates is not None:
            hidden_TD = self.program.run(ids[0], places[0], pages, updates)
            logits_KV = self.policy.logits_of(hidden_TD.index_select(0, rows_K))
        else:
            logits_KV = self._logits(ids, places, pages, rows_K, images)
        logits_KV = logits_KV.float()
        parts = logits_KV.split(counts)
        return [part if len(part) else None for part in parts]

    def _logits(self, ids: Tensor, positions: Tensor, pages: Pages, rows_K: Tensor, images: dict[str, Tensor] | None = None) -> Tensor:
        """``images``: embeddings and positions of a pass with images, which stand for ``ids`` and ``positions``."""
        mask = torch.zeros(NO_MASK_SHAPE, dtype=torch.bool, device=self.device)
        inputs = {"input_ids": ids, "position_ids": positions} if images is None else images
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        return self.policy.logits(rows_K, **inputs, attention_mask=mask, attend=pages)

    def states(self, ids_T: Tensor, positions_T: Tensor, attend: Attention, adapter: str | None = None) -> Tensor:
        """(T, D) last hidden states of one row of tokens, whose attention is ``attend``: what ``policy.logits_of`` takes.

        The next pass may write over them. The caller decides about gradients.
        """
        self.adapters.use([(adapter, 0, len(ids_T))], self.device)
        updates = None if self.program is None else self.adapters.updates(self.program.linears)
        if self.program is not None and updates is not None:
            return self.program.run(ids_T, positions_T, attend, updates)
        inputs = {"input_ids": ids_T[None].to(self.device), "position_ids": positions_T[None].to(self.device)}
        mask = torch.zeros(NO_MASK_SHAPE, dtype=torch.bool, device=self.device)
        return self.policy.states(**inputs, attention_mask=mask, attend=attend)

    @torch.inference_mode()
    def embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(B, D) float32 of length 1: the last hidden state of each prompt's last token. ModelError if the model shows none."""
        if not self.policy.has_own_head:
            raise ModelError("the model does not show its hidden states, so it gives no embeddings")
        self.adapters.use([(None, 0, sum(map(len, prompts)))], self.device)
        layout = Layout.of_documents([len(prompt) for prompt in prompts])
        ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=self.device)
        inputs = packed_inputs(layout, self.device)
        output = self.policy.decoder(input_ids=ids, position_ids=layout.position_ids().to(self.device), use_cache=False, **inputs)
        lasts = torch.tensor(layout.lengths, device=self.device).cumsum(0) - 1
        return F.normalize(output.last_hidden_state[0].index_select(0, lasts).float(), dim=-1)

    @torch.inference_mode()
    def bytes_per_token(self) -> int:
        """Memory that the keys and values of one token take, in all layers; seen on a token. ModelError if there are none."""
        trial = Runner.__new__(Runner)
        trial.policy, trial.device, trial.cache, trial._kernel = self.policy, self.device, PagedCache(1, 1), None
        trial._logits(
            probe_ids(self.policy.inner, 1),
            torch.zeros(1, 1, dtype=torch.int64),
            Pages(trial.cache, [Piece(0, 1, 1, (0,))], self.device),
            torch.tensor([0], device=self.device),
        )
        size = sum(part.numel() * part.element_size() for pair in trial.cache.layers.values() for part in pair)
        if size == 0:
            raise ModelError("the model keeps no keys and values")
        return size


def _first_wanted(part: Part) -> int:
    """Index, among the part's tokens, of the first one whose logits are wanted."""
    if not part.sequence.reads_cache and part.begin < part.sequence.num_prompt:
        return 0
    return part.end - part.begin - 1 if part.is_last else part.num_tokens


def paging_fault(model: Any) -> str | None:
    """Why ``model`` cannot be computed over a paged cache; None if it can.

    It is tried: two sequences, computed in parts that follow no order of blocks, must give the logits that they give alone.
    Sliding windows are narrowed for the trial, so that they count.
    """
    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        return "its attention works in chunks of fixed places"
    before = model.config._attn_implementation
    ids = probe_ids(model, 14)
    sequences = ids[0, :9].tolist(), ids[0, 9:].tolist()
    try:
        with evaluating(model), narrow_windows(model), torch.inference_mode():
            use_packed_attention(model)
            wanted = [model(input_ids=torch.tensor([tokens], device=ids.device), use_cache=False).logits[0] for tokens in sequences]
            found = _in_parts(model, sequences)
    except (ModelError, AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as problem:
        model.config._attn_implementation = before
        return f"its forward pass does not take it: {str(problem).splitlines()[0]}"
    if all(is_close(one, other) for one, other in zip(found, wanted, strict=True)):
        return None
    model.set_attn_implementation(before)
    return "its layers carry something that is not in the keys and values"


def _in_parts(model: Any, sequences: Sequence[list[int]]) -> list[Tensor]:
    """Logits of all tokens of two sequences of 9 and 5 tokens, in blocks of 2."""
    runner = Runner(model, PagedCache(10, 2))
    blocks = (7, 1, 4, 0, 9), (3, 8, 2)
    lengths = [(4, 2), (1, 1), (3, 1), (1, 1)]
    done = [0, 0]
    logits: list[list[Tensor]] = [[], []]
    for step in lengths:
        pieces: list[Piece] = []
        tokens: list[int] = []
        positions: list[int] = []
        for number, length in enumerate(step):
            end = done[number] + length
            pieces.append(Piece(len(tokens), length, end, blocks[number]))
            tokens += sequences[number][done[number] : end]
            positions += range(done[number], end)
            done[number] = end
        pages = Pages(runner.cache, pieces, runner.device)
        rows = torch.arange(len(tokens), device=runner.device)
        both = runner._logits(torch.tensor([tokens]), torch.tensor([positions]), pages, rows).split(step)
        for number in (0, 1):
            logits[number].append(both[number])
    return [torch.cat(parts) for parts in logits]
