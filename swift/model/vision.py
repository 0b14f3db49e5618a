"""Models that read images: which snapshot is one, and its processor. Nothing is known by name: config.json and transformers say it."""

from pathlib import Path
from typing import Any

from swift import deps
from swift.errors import DependencyError, ModelError, first_line
from swift.model.files import read_config
from swift.model.tokenizer import with_template

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def reads_images(path: Path) -> bool:
    """Whether the snapshot is a model that continues texts with images in them, with the settings of its processor beside it."""
    if not any((path / name).is_file() for name in PROCESSOR_FILES):
        return False
    config = read_config(path)
    if config.get("is_encoder_decoder"):
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return config.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def load_processor(path: Path, *, chat_template: str | None = None) -> Any:
    """The processor in ``path``, whose tokenizer has the model's chat template, or the Jinja text in its place.

    Raises DependencyError for a package that it needs, ModelError if it cannot be loaded.
    """
    deps.require("PIL", extra="vision", package="pillow")
    from transformers import AutoProcessor

    try:
        try:
            processor: Any = AutoProcessor.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        except ImportError:
            processor = _of_images_alone(path)
    except ImportError as problem:
        raise DependencyError(
            f"{path}: the processor needs a package that is not installed: {first_line(problem)}", hint="pip install 'swift-llm[vision]'"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ModelError(f"{path}: the processor cannot be loaded: {first_line(problem)}") from problem
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ModelError(f"{path}: the processor {type(processor).__name__} is not one of images and text")
    own = processor.chat_template if isinstance(processor.chat_template, str) else None
    processor.tokenizer = with_template(path, processor.tokenizer, chat_template or processor.tokenizer.chat_template or own)
    return processor


def _of_images_alone(path: Path) -> Any:
    """The processor without that of videos, which needs torchvision where the one of images does not."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    known: Any = PROCESSOR_MAPPING
    base = known[type(config)]
    parts = base.get_attributes()
    if "video_processor" not in parts:
        return base.from_pretrained(path, local_files_only=True)

    class ImagesAlone(base):  # type: ignore[misc, valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in parts if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            found = super()._get_arguments_from_pretrained(*args, **kwargs)
            found.insert(parts.index("video_processor"), None)
            return found

    return ImagesAlone.from_pretrained(path, local_files_only=True)
