"""What an engine is made from: a model on disk and the options; weights in torch for those engines alone that compute with it."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from swift.errors import ConfigError
from swift.model.load import Loaded, Quantization, context_length, end_tokens, load_model
from swift.model.template import read_template
from swift.model.tokenizer import load_tokenizer
from swift.model.vision import load_processor, reads_images
from swift.tuner.adapter import with_adapter


@dataclass(frozen=True)
class Source:
    """The model in the folder ``path``, with the adapter in the folder ``adapter``; ``merge`` puts that into the weights.

    ``config`` is the command's: a GenerateConfig that is a ModelConfig too.
    """

    path: Path
    config: Any
    adapter: Path | None = None
    merge: bool = False
    quantization: Quantization | None = None

    @cached_property
    def loaded(self) -> Loaded:
        """Model and tokenizer in torch as the options say, in evaluation mode. They are read when this is first asked for."""
        config = self.config
        return self.load(torch_dtype=config.torch_dtype, attn_impl=config.attn_impl, device=config.device, merge=self.merge)

    def load(self, *, torch_dtype: str | None, attn_impl: str | None, device: str | None, merge: bool) -> Loaded:
        """Model and tokenizer in torch, in evaluation mode, read anew."""
        loaded = load_model(
            self.path,
            torch_dtype=torch_dtype,
            attn_impl=attn_impl,
            device=device,
            quantization=self.quantization,
            chat_template=read_template(self.config.chat_template),
            processor=self.processor,
            dense=merge,
        )
        if self.adapter is None:
            return loaded
        model = with_adapter(loaded.model, self.adapter)
        if merge:
            model = model.merge_and_unload()
        return replace(loaded, model=model)

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in torch."""
        return "loaded" in self.__dict__

    @cached_property
    def processor(self) -> Any:
        """The model's processor if it reads images, None otherwise."""
        return load_processor(self.path, chat_template=read_template(self.config.chat_template)) if reads_images(self.path) else None

    @cached_property
    def tokenizer(self) -> Any:
        if self.is_loaded:
            return self.loaded.tokenizer
        if self.processor is not None:
            return self.processor.tokenizer
        return load_tokenizer(self.path, chat_template=read_template(self.config.chat_template))

    @cached_property
    def generation_config(self) -> Any:
        """The model's generation_config, as transformers would load it with the model."""
        from transformers import AutoConfig, GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self.path, local_files_only=True)
        except OSError:
            return GenerationConfig.from_model_config(AutoConfig.from_pretrained(self.path, local_files_only=True))

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return tuple(end_tokens(self, self.tokenizer))

    @property
    def max_model_len(self) -> int:
        """Longest prompt and answer together, in tokens: the option's, but no more than the model's."""
        return min(context_length(self.path) or 2**31, self.config.max_model_len or 2**31)

    @property
    def place(self) -> str:
        """Where it is computed, for a reader."""
        return str(self.loaded.device) if self.is_loaded else str(self.config.infer_backend)

    def facts(self) -> dict[str, Any]:
        """Device, precision and the number of tokens that the weights have, if these are in torch."""
        if not self.is_loaded:
            return {}
        return {
            "device": str(self.loaded.device),
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "vocab_size": int(self.loaded.model.get_input_embeddings().weight.shape[0]),
        }

    def refuse_adapter(self, backend: str) -> None:
        """ConfigError if there is an adapter: ``backend`` reads whole models."""
        if self.adapter is not None:
            raise ConfigError(
                f"--infer_backend {backend} takes no adapter", hint="swift merge-lora makes a model of it; name that with --model"
            )
