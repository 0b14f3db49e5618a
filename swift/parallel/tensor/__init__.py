"""Tensor parallelism: processes share each layer, as the model's own plan says."""

from swift.parallel.tensor.split import split_layers
from swift.parallel.tensor.whole import whole

__all__ = ["split_layers", "whole"]
