"""Tensor parallelism: processes share each layer, as the model's own plan says."""

from swift.parallel.tensor.split import split_layers
from swift.parallel.tensor.whole import fill, whole

__all__ = ["fill", "split_layers", "whole"]
