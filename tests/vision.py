"""Small random models that read images, with tokenizer, template and processor, as a snapshot has them: one of each kind of positions."""

import io
import random
from pathlib import Path

from tests.tiny import make_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_llava(path):
    """CLIP and Llama: an image of 24 x 24 is 9 tokens."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = _tokenizer("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=24, patch_size=8).to_dict(),
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return _saved(path, LlavaForConditionalGeneration, config, processor)


def make_idefics3(path):
    """SigLIP and Llama, as in SmolVLM: an image is cut into up to 2 x 2 pieces of 4 tokens each, and once more as a whole."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    cells = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    tokenizer = _tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *cells)
    config = Idefics3Config(
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=TEMPLATE.replace("IMAGE", "<image>"))
    return _saved(path, Idefics3ForConditionalGeneration, config, processor)


def make_qwen2_vl(path):
    """Positions of three axes: a token for each 8 x 8 pixels."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    return _qwen(path, Qwen2VLConfig, Qwen2VLForConditionalGeneration, tower, {"mrope_section": [1, 1, 2]})


def make_qwen3_vl(path):
    """The decoder gets features of images in its layers, too."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tower = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
    tower |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    rope = {"mrope_section": [1, 1, 2], "mrope_interleaved": True}
    return _qwen(path, Qwen3VLConfig, Qwen3VLForConditionalGeneration, tower, rope)


def _qwen(path, kind_of_config, kind, tower, rope):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = {name: f"<|{name}|>" for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    tokenizer = _tokenizer(*names.values())
    image, video, begin, end = (tokenizer.convert_tokens_to_ids(name) for name in names.values())
    config = kind_of_config(
        vision_config=tower,
        text_config={**_text(tokenizer), "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope}},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=begin,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer.save_pretrained(path)  # the processor as a whole needs torchvision, for videos
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096})
    return _saved(path, kind, config, images)


MODELS = {"llava": make_llava, "idefics3": make_idefics3, "qwen2_vl": make_qwen2_vl}


def picture(seed=0, size=(56, 40)):
    """An image of noise (PIL), the same for the same seed."""
    from PIL import Image

    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


def encoded(image, kind="PNG"):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def _tokenizer(*tokens):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def _text(tokenizer):
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _saved(path, kind, config, processor):
    import torch

    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.to(torch.float32).save_pretrained(str(path))
    processor.save_pretrained(str(path))
    return path
