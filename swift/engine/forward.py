"""Log-probabilities of texts by a model's own forward pass, one text after the other: the reference, for any model."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from swift.engine.scoring import Score, Text, check_texts, context_of
from swift.errors import ModelError


class ForwardScorer:
    """Scores texts with ``model``, bare or inside PEFT, in evaluation mode. Nothing is shared between texts but their score, if equal."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def scores(self, texts: Sequence[Text]) -> Iterator[tuple[int, Score]]:
        """See Scorer. ModelError, when it is met, for logits that are no numbers."""
        check_texts(texts, context=context_of(self.inner), vocabulary=int(self.inner.get_input_embeddings().weight.shape[0]))
        return self._scores(texts)

    def _scores(self, texts: Sequence[Text]) -> Iterator[tuple[int, Score]]:
        known: dict[Text, Score] = {}
        for number, text in enumerate(texts):
            if text not in known:
                known[text] = self._score(number, text)
            yield number, known[text]

    @torch.no_grad()
    def _score(self, number: int, text: Text) -> Score:
        ids = torch.tensor([text.tokens], device=self.inner.get_input_embeddings().weight.device)
        count = len(text.tokens) - text.start
        # What comes first may be tokens that an adapter puts before the text: it is counted from the end.
        kept = {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(self.inner.forward).parameters else {}
        logits = self.model(input_ids=ids[:, :-1], use_cache=False, **kept).logits[0, -count:].float()
        logprobs = logits.log_softmax(-1).gather(1, ids[0, text.start :, None])[:, 0]
        if logprobs.isnan().any():
            raise ModelError(f"the model's logits are no numbers for text {number}", hint="its weights may hold NaN; try float32")
        return Score(tuple(logprobs.tolist()), bool((logits.argmax(-1) == ids[0, text.start :]).all()))
