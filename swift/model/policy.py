"""A causal language model as training sees it: hidden states of a batch, and the head at the positions that matter.

No model is known by name. The head is whatever the model's own forward does after its decoder (a linear layer, scaled or
soft-capped), and is run by letting that forward see given hidden states in place of the decoder's. Both that and
per-document attention are tried on the model itself before they are relied on.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from swift.errors import ModelError
from swift.model.attention import Root, packed_inputs, use_packed_attention
from swift.model.batch import Batch
from swift.model.chunked import Head, chunked_cross_entropy
from swift.model.collectives import sum_gradient
from swift.model.layout import Layout
from swift.model.logps import chunked_logps
from swift.model.noise import tell_lengths
from swift.model.vocabulary import VocabularyPart, local, vocabulary_part

# B rows, T tokens of a row, K positions whose prediction is wanted, D model width, C positions of a part, V vocabulary


class Policy:
    """What objectives compute with. ``model`` is a transformers model, bare or inside PEFT.

    Forward passes of a model in parts go through ``call``, which brings the weights together: those of the trials here,
    and those of the objectives, whose caller sees to it.
    """

    def __init__(self, model: Any, *, router_aux_loss_coef: float = 0.0, call: Callable[..., Any] | None = None) -> None:
        self.model = model
        self.call = call or _directly
        self.inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = self.inner.base_model
        self.router_aux_loss_coef = router_aux_loss_coef
        self._output_type: Any = None
        self._root: Root | None = None
        self.has_own_head = self.decoder is not self.inner and self.call(self._head_is_separable)
        self.part: VocabularyPart | None = None  # of the head, whose vocabulary other processes share
        if self.has_own_head:
            self.part = self.call(self._own_part)
        self._is_product = self.has_own_head and self.call(self._head_is_product)
        self.packed_head: Head | None = None  # what an engine that packs the weights has put in its place

    @property
    def head(self) -> Head | Tensor:
        """What makes logits of hidden states: a weight (V, D), or a function."""
        if self.packed_head is not None:
            return self.packed_head
        if not self.has_own_head:
            return _same
        if not self._is_product:
            return self._head
        weight: Tensor = self.inner.get_output_embeddings().weight
        return weight

    def cross_entropy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of weight times -log p(target), number of right predictions), float32 scalars.

        A mixture of experts adds ``router_aux_loss_coef`` times its load-balancing loss for each prediction that counts.
        """
        hidden_KD, balance = self._kept(batch)
        predictions = batch.row_S, batch.target_S, batch.weight_S
        with self._head_for(hidden_KD) as (head, parameters, hidden_KD, how):
            loss, right = chunked_cross_entropy(head, parameters, hidden_KD, *predictions, **how)
        if balance is not None:
            loss = loss + self.router_aux_loss_coef * (batch.weight_S != 0).sum() * balance
        return loss, right

    def logps(self, batch: Batch) -> Tensor:
        """(num_documents,) float32: the sum of weight times log p(target) over the predictions of each document."""
        hidden_KD, _ = self._kept(batch)
        with self._head_for(hidden_KD) as (head, parameters, hidden_KD, how):
            logps_S = chunked_logps(head, parameters, hidden_KD, batch.row_S, batch.target_S, **how)
        return logps_S.new_zeros(batch.num_documents).index_add(0, batch.document_S, logps_S * batch.weight_S)

    def logits(self, rows_K: Tensor, **inputs: Any) -> Tensor:
        """(K, V) logits at places ``rows_K`` of the one row that ``inputs`` of the decoder describe."""
        return self.logits_of(self.states(**inputs).index_select(0, rows_K))

    def states(self, **inputs: Any) -> Tensor:
        """(T, D) the decoder's hidden states of that row; its logits (T, V) if the head cannot be told apart."""
        if not self.has_own_head:
            logits_TV: Tensor = self.inner(use_cache=False, **inputs).logits[0]
            return logits_TV
        output = self.decoder(use_cache=False, **inputs)
        self._output_type = type(output)
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD

    def logits_of(self, hidden_KD: Tensor) -> Tensor:
        """(K, V) logits of what ``states`` gave."""
        if not isinstance(self.head, Tensor):
            return self.head(hidden_KD)
        if self.part is None:
            return hidden_KD @ self.head.T
        logits_KV: Tensor = self.inner.get_output_embeddings()(hidden_KD)
        return logits_KV

    @contextlib.contextmanager
    def root(self, ids_P: Tensor | None, document_length: int | None = None) -> Iterator[None]:
        """Within, batches whose layout has a root of P tokens continue ``ids_P``, which are computed once, here.

        Their gradient is taken when the block ends, after the backward passes of all batches. ``document_length`` is that of
        the longest document that continues them.
        """
        if ids_P is None:
            yield
            return
        layout = Layout.of_documents([len(ids_P)])
        self._root = Root()
        tell_lengths(self.inner, None if document_length is None else torch.full((len(ids_P),), document_length))
        inputs = packed_inputs(layout, ids_P.device, self._root)
        self.decoder(input_ids=ids_P[None], position_ids=layout.position_ids().to(ids_P.device), use_cache=False, **inputs)
        try:
            yield
            if torch.is_grad_enabled():
                self._root.backward()
        finally:
            self._root = None

    @property
    def _vocabulary(self) -> int:
        return int(self.inner.config.get_text_config().vocab_size)

    @contextlib.contextmanager
    def _head_for(self, hidden_KD: Tensor) -> Iterator[tuple[Head | Tensor, list[Tensor], Tensor, dict[str, Any]]]:
        """(the head, its parameters, the states it is given, what else says how large it is): all, or this process's part."""
        parameters = list(self.inner.get_output_embeddings().parameters()) if self.has_own_head else []
        head, part = self.head, self.part
        if part is None:
            yield head, parameters, hidden_KD, {"vocabulary": self._vocabulary}
            return
        if isinstance(head, Tensor):
            head = local(self.inner.get_output_embeddings().weight)
            parameters = [head]
        with part.alone():
            yield head, parameters, sum_gradient(hidden_KD, part.group), {"vocabulary": part.largest, "part": part}

    def _kept(self, batch: Batch) -> tuple[Tensor, Any]:
        """(hidden states (K, D) of the positions that predict something, the load-balancing loss if it is wanted)."""
        hidden_BTD, balance = self._decode(batch)
        return hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).index_select(0, batch.kept_K), balance

    def own(self, batch: Batch) -> Batch:
        """What ``decode`` computes of ``batch``: all of it."""
        return batch

    def decode(self, batch: Batch) -> Tensor:
        """(B, T, D) the decoder's hidden states, or logits if the head cannot be told apart: what a loss is taken from."""
        return self._decode(batch)[0]

    def _decode(self, batch: Batch) -> tuple[Tensor, Any]:
        """(hidden states (B, T, D), or logits if the head cannot be told apart; the load-balancing loss if it is wanted)."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        tell_lengths(self.inner, batch.layout.document_lengths() if batch.layout is not None else None)
        if batch.position_ids is not None:
            inputs["position_ids"] = batch.position_ids
        if batch.layout is not None:
            inputs |= packed_inputs(batch.layout, batch.input_ids.device, self._root)
        elif batch.attention_mask is not None:
            inputs["attention_mask"] = batch.attention_mask
        if self.router_aux_loss_coef:
            inputs["output_router_logits"] = True
        if not self.has_own_head:
            output = self.inner(**inputs)
            return output.logits, getattr(output, "aux_loss", None) if self.router_aux_loss_coef else None
        output = self.decoder(**inputs)
        self._output_type = type(output)
        routers = getattr(output, "router_logits", None) if self.router_aux_loss_coef else None
        return output.last_hidden_state, None if routers is None else self._balance(routers)

    def _head(self, hidden_CD: Tensor) -> Tensor:
        """Logits (C, V) of hidden states."""
        with self._decoder_gives(last_hidden_state=hidden_CD[None]):
            logits: Tensor = self.inner(inputs_embeds=hidden_CD[None], use_cache=False).logits[0]
        return logits

    def _balance(self, routers: Any) -> Tensor:
        """The model's own load-balancing loss of one batch."""
        states = routers[0].new_zeros(1, 1, self.inner.get_input_embeddings().weight.shape[1])
        with self._decoder_gives(last_hidden_state=states, router_logits=routers):
            loss: Tensor = self.inner(inputs_embeds=states, use_cache=False, output_router_logits=True).aux_loss
        return loss

    @contextlib.contextmanager
    def _decoder_gives(self, **fields: Any) -> Iterator[None]:
        """Within, a forward pass of the model takes ``fields`` for what its decoder computed."""
        assert self._output_type is not None
        known = {field.name for field in dataclasses.fields(self._output_type)}
        output = self._output_type(**{name: value for name, value in fields.items() if name in known})
        self.decoder.forward = lambda *_, **__: output
        try:
            yield
        finally:
            del self.decoder.forward  # the class's own is seen again

    @torch.no_grad()
    def _head_is_separable(self) -> bool:
        """Whether head(decoder(tokens)) is what the model computes."""
        if "forward" in vars(self.decoder) or self.inner.get_output_embeddings() is None:
            return False
        with evaluating(self.inner):
            ids = probe_ids(self.inner, 4)
            try:
                wanted = self.inner(input_ids=ids, use_cache=False).logits[0]
                output = self.decoder(input_ids=ids, use_cache=False)
                self._output_type = type(output)
                found = self._head(output.last_hidden_state[0])
            except (AttributeError, TypeError, ValueError, AssertionError):
                return False
        return found.shape == wanted.shape and is_close(found, wanted)

    @torch.no_grad()
    def _head_is_product(self) -> bool:
        """Whether the head is a product with its weight and nothing else; large states show a cap and a bias both."""
        layer = self.inner.get_output_embeddings()
        if type(layer) is not nn.Linear or layer.bias is not None:
            return False
        if self.part is None and vocabulary_part(layer) is not None:
            return False
        weight, part = local(layer.weight), self.part
        states = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
        sizes = [states * size / (states @ weight.T).abs().max().clamp_min(1e-6) for size in (1.0, 1000.0)]
        with evaluating(self.inner), part.alone() if part is not None else contextlib.nullcontext():
            is_product = all(is_close(self._head(some), some @ weight.T, exactly=True) for some in sizes)
        return is_product if part is None else part.all_agree(is_product, weight.device)

    @torch.no_grad()
    def _own_part(self) -> VocabularyPart | None:
        """This process's part of the vocabulary, if the logits of a part can be had alone: what follows the product acts on each."""
        layer = self.inner.get_output_embeddings()
        part = vocabulary_part(layer)
        if part is None:
            return None
        embedding = self.inner.get_input_embeddings().weight
        states = torch.randn(3, embedding.shape[1], generator=torch.Generator().manual_seed(0)).to(embedding.device, embedding.dtype)
        with evaluating(self.inner):
            wanted = self._head(states)[:, part.first : part.first + part.size]
            with part.alone():
                found = self._head(states)
        is_apart = found.shape == wanted.shape and is_close(found, wanted, exactly=True)
        return part if part.all_agree(is_apart, wanted.device) else None


def packing_fault(model: Any) -> str | None:
    """Why documents of a flat batch would not be computed each by itself in ``model``; None if they are.

    The model is switched to per-document attention and tried: three documents, two of which share a beginning, must give
    the logits that they give alone. Sliding windows are narrowed for the trial, so that they count.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(inner.config.get_text_config(), "attention_chunk_size", None):
        return "its attention works in chunks of fixed places"
    before = inner.config._attn_implementation
    try:
        if not _is_finite(inner):
            return "its logits are not finite numbers"
        use_packed_attention(inner)
        is_apart = _keeps_documents_apart(inner)
    except (ModelError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as problem:
        inner.config._attn_implementation = before
        return f"its forward pass does not take it: {str(problem).splitlines()[0]}"
    if not is_apart:
        inner.set_attn_implementation(before)
        return "its layers carry something from one document to the next"
    return None


@torch.no_grad()
def _is_finite(model: Any) -> bool:
    with evaluating(model):
        return bool(model(input_ids=probe_ids(model, 4), use_cache=False).logits.isfinite().all())


@torch.no_grad()
def _keeps_documents_apart(model: Any) -> bool:
    """Whether each document has its own logits, and whether these stay when the tokens of the others change.

    The second is the sharper question: nothing is computed in another order, so nothing may move.
    """
    layout = Layout(lengths=(3, 4, 5, 6), parents=(-1, 0, 0, -1))
    ids = probe_ids(model, layout.num_tokens)
    documents = [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]]

    def packed(ids: Tensor) -> Tensor:
        inputs = packed_inputs(layout, ids.device)
        logits: Tensor = model(input_ids=ids, position_ids=layout.position_ids().to(ids.device), use_cache=False, **inputs).logits[0]
        return logits

    with evaluating(model), narrow_windows(model):
        first = packed(ids)
        for places in documents:
            if not is_close(first[places], model(input_ids=ids[:, places], use_cache=False).logits[0]):
                return False
            changed = ids.roll(1, dims=1)
            changed[:, places] = ids[:, places]
            if not is_close(packed(changed)[places], first[places], exactly=True):
                return False
        return is_close(_after_root(model, ids[:, :7]), first[3:7])


def _after_root(model: Any, ids: Tensor) -> Tensor:
    """Logits of all but the first three tokens, which are computed before."""
    root, before, rest = Root(), Layout((3,), (-1,)), Layout((ids.shape[1] - 3,), (-1,), root=3)
    for layout, part in ((before, ids[:, :3]), (rest, ids[:, 3:])):
        inputs = packed_inputs(layout, ids.device, root)
        logits: Tensor = model(input_ids=part, position_ids=layout.position_ids().to(ids.device), use_cache=False, **inputs).logits[0]
    return logits


@contextlib.contextmanager
def narrow_windows(model: Any) -> Iterator[None]:
    owners = [model.config, model.config.get_text_config(), *model.modules()]
    owners = [owner for owner in owners if isinstance(getattr(owner, "sliding_window", None), int)]
    kept = [owner.sliding_window for owner in owners]
    for owner in owners:
        owner.sliding_window = 3
    try:
        yield
    finally:
        for owner, window in zip(owners, kept, strict=True):
            owner.sliding_window = window


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def probe_ids(model: Any, count: int) -> Tensor:
    """(1, count) tokens that differ from one another."""
    weight: Tensor = model.get_input_embeddings().weight
    ids = torch.arange(count) * 37 % (weight.shape[0] - 1) + 1
    return ids[None].to(weight.device)


def is_close(found: Tensor, wanted: Tensor, *, exactly: bool = False) -> bool:
    """Equal but for the rounding of another order of sums; ``exactly``: of experts that get other numbers of tokens."""
    tolerance = 1e-3 if wanted.dtype == torch.float32 else 0.05
    if exactly:
        tolerance = 1e-6 if wanted.dtype == torch.float32 else 1e-2
    found, wanted = found.float(), wanted.float()
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1e-6))


def _directly(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _same(logits: Tensor) -> Tensor:
    return logits
