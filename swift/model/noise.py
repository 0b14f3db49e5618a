"""Noise on the embeddings while training (NEFTune, Jain et al. 2023, arXiv:2310.05914)."""

import torch
from torch import Tensor, nn

# B rows, T tokens of a row, D model width


class Noise:
    """A forward hook of an embedding: uniform noise of scale alpha / sqrt(L D), L tokens of the row that a token is in."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.lengths_T: Tensor | None = None
        """L of each token when rows stand side by side; None for rows of one length."""

    def __call__(self, module: nn.Module, args: object, embedded_BTD: Tensor) -> Tensor:
        if not module.training:
            return embedded_BTD
        noise = torch.empty_like(embedded_BTD).uniform_(-self.alpha, self.alpha)
        num_tokens, width = embedded_BTD.shape[1:]
        if self.lengths_T is None or len(self.lengths_T) != num_tokens:
            return embedded_BTD + noise.div_((num_tokens * width) ** 0.5)
        return embedded_BTD + noise.div_((self.lengths_T.to(noise.device, noise.dtype) * width).sqrt()[:, None])


def add_noise(model: nn.Module, alpha: float) -> None:
    """Let ``model``'s embeddings have noise while it is in training mode."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    noise = Noise(alpha)
    embedding.register_forward_hook(noise)
    embedding.noise = noise  # type: ignore[assignment]


def tell_lengths(model: nn.Module, lengths_T: Tensor | None) -> None:
    """Tell the noise of ``model``, if it has one, how long the row of each token is in the next forward pass."""
    noise = getattr(model.get_input_embeddings(), "noise", None)  # type: ignore[operator]
    if isinstance(noise, Noise):
        noise.lengths_T = lengths_T
