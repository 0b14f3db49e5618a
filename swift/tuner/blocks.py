"""The layers of a decoder, found by structure."""

from typing import Any

from torch import nn

from swift.errors import ConfigError


def blocks_of(model: Any) -> nn.ModuleList:
    """The list of the model's equal layers; ConfigError if there is no list as long as its config says."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError("the layers of this model cannot be found: no list of modules is as long as its config says")
