"""Log-probabilities of texts by the native engine: a trie of all of them, computed pass by pass over one small cache."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swift.engine.forward import ForwardScorer
from swift.engine.native.mapped import MappedWeights, layer_by_layer
from swift.engine.native.pages import PagedCache
from swift.engine.native.runner import Runner, paging_fault
from swift.engine.native.tree import Path, Tree
from swift.engine.native.trie import Ints, Trie, trie_of
from swift.engine.scoring import Score, Scorer, Text, check_texts, context_of
from swift.errors import DataError, ModelError

MOST_LOGITS = 2**22  # numbers of logits at once, 16 MiB in float32
SLICE = 2**13  # tokens of the vocabulary whose weights are read at once
LIVE_CACHE_BYTES = 2**30  # for keys and values beside a model in training
LIVE_NUM_TOKENS = 512

# T rows of a pass, K of them whose logits are read, M scored tokens, V vocabulary, C tokens of a part of it, D model width


class TrieScorer:
    """Scores texts with the model of ``runner``. What texts begin with in common is computed once.

    A pass computes ``max_num_tokens`` tokens. Keys and values of the longest text and of one pass are held at most; where
    ``kv_cache_bytes`` are fewer, passes get shorter. ``is_layer_by_layer``: weights that lie in mapped files stay there, until
    they are packed.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        context: int,
        bytes_per_token: int,
        kv_cache_bytes: int,
        max_num_tokens: int,
        is_layer_by_layer: bool = False,
    ) -> None:
        self.runner = runner
        self.context = context
        self.vocabulary = int(runner.policy.inner.get_input_embeddings().weight.shape[0])
        self.most_places = kv_cache_bytes // bytes_per_token
        self.max_num_tokens = max_num_tokens
        self.is_layer_by_layer = is_layer_by_layer
        self.num_computed = 0  # tokens, of all calls
        self.num_given = 0  # tokens that each text alone would have taken

    def scores(self, texts: Sequence[Text], *, adapter: str | None = None) -> Iterator[tuple[int, Score]]:
        """See Scorer. ``adapter`` names one that is loaded beside the model. DataError, too, for a text that the cache does not hold.

        ModelError, when it is met, for logits that are no numbers.
        """
        check_texts(texts, context=self.context, vocabulary=self.vocabulary)
        longest = max((len(text.tokens) for text in texts), default=2) - 1
        if longest > self.most_places:
            raise DataError(
                f"a text has {longest} tokens to compute, the cache of keys and values holds {self.most_places}",
                hint="give it more memory: --kv_cache_gib",
            )
        if adapter is not None and adapter not in self.runner.adapters:
            raise DataError(f"no adapter {adapter!r} is loaded")
        return self._scores(texts, adapter, min(self.most_places, longest + self.max_num_tokens)) if texts else iter(())

    def _scores(self, texts: Sequence[Text], adapter: str | None, num_places: int) -> Iterator[tuple[int, Score]]:
        trie = trie_of(texts)
        self.num_given += sum(len(text.tokens) - 1 for text in texts)
        order = trie.rows.argsort(kind="stable")
        read = trie.rows[order]
        lasts = trie.rows[trie.begins[1:] - 1]
        finished = iter(lasts.argsort(kind="stable").tolist())
        logprobs, greedy = np.empty(len(order), np.float32), np.empty(len(order), np.bool_)
        cache, path = PagedCache(num_places, 1), Path(num_places)
        waiting = next(finished, None)
        for begin, end in _passes(trie, num_places, self.max_num_tokens):
            wanted = order[np.searchsorted(read, begin) : np.searchsorted(read, end)]
            logprobs[wanted], greedy[wanted] = self._pass(trie, begin, end, wanted, cache, path, adapter)
            self.num_computed += end - begin
            while waiting is not None and lasts[waiting] < end:
                own = slice(trie.begins[waiting], trie.begins[waiting + 1])
                if np.isnan(logprobs[own]).any():
                    raise ModelError(f"the model's logits are no numbers for text {waiting}", hint="its weights may hold NaN; try float32")
                yield waiting, Score(tuple(logprobs[own].tolist()), bool(greedy[own].all()))
                waiting = next(finished, None)

    def _pass(self, trie: Trie, begin: int, end: int, wanted: Ints, cache: PagedCache, path: Path, adapter: str | None) -> tuple[Any, Any]:
        """Log-probabilities (M,) of the scored tokens ``wanted``, and whether each was the likeliest there."""
        device = self.runner.device
        positions = trie.positions[begin:end]
        taken, tiles = path.take(positions)
        tree = Tree(cache, torch.from_numpy(taken).to(device), tiles)
        rows_K, where_M = np.unique(trie.rows[wanted] - begin, return_inverse=True)
        is_packed = self.runner.packed is not None
        in_files = layer_by_layer(self.runner.policy.inner) if self.is_layer_by_layer and not is_packed else contextlib.nullcontext()
        with in_files as files, torch.inference_mode() if is_packed else torch.no_grad():
            states_TD = self.runner.states(torch.from_numpy(trie.ids[begin:end]), torch.from_numpy(positions), tree, adapter)
            states_KD = states_TD.index_select(0, torch.from_numpy(rows_K).to(device))
            return self._read(states_KD, where_M, trie.tokens[wanted], files)

    def _read(self, states_KD: Tensor, where_M: Ints, tokens_M: Ints, files: MappedWeights | None) -> tuple[Any, Any]:
        """Of ``tokens_M`` after the states ``where_M``, which ascend. Few logits at once, however many are read."""
        logprobs: list[Tensor] = []
        greedy: list[Tensor] = []
        width = min(self.vocabulary, SLICE) if isinstance(self.runner.policy.head, Tensor) else self.vocabulary
        size = max(1, MOST_LOGITS // width)
        for begin in range(0, len(states_KD), size):
            states = states_KD[begin : begin + size]
            mine = slice(*np.searchsorted(where_M, [begin, begin + size]))
            where, tokens = (torch.from_numpy(part[mine]).to(states.device) for part in (where_M - begin, tokens_M))
            chosen = states.new_full((len(tokens),), torch.nan, dtype=torch.float32)
            most_K = total_K = states.new_full((len(states),), -torch.inf, dtype=torch.float32)
            for first, logits_KC in self._logits(states, files):
                is_here = (tokens >= first) & (tokens < first + logits_KC.shape[1])
                chosen[is_here] = logits_KC[where[is_here], tokens[is_here] - first]
                most_K = most_K.maximum(logits_KC.amax(-1))
                total_K = total_K.logaddexp(logits_KC.logsumexp(-1))
            greedy.append(chosen >= most_K[where])
            logprobs.append(chosen - total_K[where])
        if not logprobs:
            return np.empty(0, np.float32), np.empty(0, np.bool_)
        return torch.cat(logprobs).cpu().numpy(), torch.cat(greedy).cpu().numpy()

    def _logits(self, states_KD: Tensor, files: MappedWeights | None) -> Iterator[tuple[int, Tensor]]:
        """Float32 logits (K, C) of parts of the vocabulary, and where each begins: one part, if the head is more than a product with
        its weight (V, D). What was read of a weight that lies in ``files`` is let go."""
        head = self.runner.policy.head
        if not isinstance(head, Tensor):
            yield 0, self.runner.policy.logits_of(states_KD).float()
            return
        for begin, weight_CD in zip(range(0, len(head), SLICE), head.split(SLICE), strict=True):
            yield begin, (states_KD @ weight_CD.T).float()
            if files is not None:
                files.let_go(weight_CD)


def _passes(trie: Trie, num_places: int, most: int) -> Iterator[tuple[int, int]]:
    """Rows of each pass, from and to: as many as there are places for, behind the path that leads to the first."""
    begin = 0
    while begin < trie.num_tokens:
        end = min(begin + min(most, num_places - int(trie.positions[begin])), trie.num_tokens)
        yield begin, end
        begin = end


@contextlib.contextmanager
def scorer_of(model: Any) -> Iterator[Scorer]:
    """Within, a scorer that computes with ``model`` as it stands, which may be in training: its weights are neither packed nor changed.

    Afterwards its attention, the mode of each of its modules and torch's random numbers are as they were. A model that cannot
    be paged is run text by text.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = inner.config._attn_implementation
    modes = [(module, module.training) for module in model.modules()]
    devices = [parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"]
    with torch.random.fork_rng(devices=sorted({device.index or 0 for device in devices})):
        try:
            model.eval()
            yield _live(model, inner)
        finally:
            if inner.config._attn_implementation != attention:
                inner.set_attn_implementation(attention)
            for module, mode in modes:
                module.training = mode


def _live(model: Any, inner: Any) -> Scorer:
    has_virtual_tokens = any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())
    if has_virtual_tokens or paging_fault(inner) is not None:
        return ForwardScorer(model)
    runner = Runner(inner, PagedCache(0, 1))
    return TrieScorer(
        runner,
        context=context_of(inner),
        bytes_per_token=runner.bytes_per_token(),
        kv_cache_bytes=LIVE_CACHE_BYTES,
        max_num_tokens=LIVE_NUM_TOKENS,
    )
