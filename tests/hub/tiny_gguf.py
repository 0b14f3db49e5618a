"""Writes a model folder as a llama GGUF file, the way llama.cpp's converter lays it out; and small wheels by hand."""

import base64
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{_NAMES[rest]}.weight"
    return f"{_NAMES[stem]}.weight"


def permuted(weights: Any, num_heads: int) -> Any:
    """From the half-split rotary layout of transformers to the interleaved one of llama.cpp."""
    rows, columns = weights.shape
    return weights.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(model: Path, target: Path, *, quantization: str = "F32", extra: dict[str, Any] | None = None) -> Path:
    """``model`` (a tiny Llama with a byte-level BPE tokenizer) as a GGUF file, its matrices in ``quantization``."""
    import gguf
    from gguf.quants import quantize
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text())
    kind = gguf.GGMLQuantizationType[quantization]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, model)
    tensors = load_file(model / "model.safetensors") | (extra or {})
    for name, values in tensors.items():
        values = values.astype("float32")
        for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if projection in name:
                values = permuted(values, config[heads])
        name = name if name in (extra or {}) else gguf_name(name)
        if values.ndim == 2 and quantization != "F32":
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add_tokenizer(writer: Any, model: Path) -> None:
    import gguf
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    core = json.loads((model / "tokenizer.json").read_text())
    special = {entry["content"] for entry in core["added_tokens"]}
    tokens = sorted(core["model"]["vocab"], key=core["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in core["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def write_wheel(
    folder: Path, name: str, files: dict[str, bytes], *, version: str = "1.0", requires: tuple[str, ...] = (), spoil: str | None = None
) -> Path:
    """A pure wheel with ``files`` below its package; ``spoil`` names a file whose RECORD hash is of other bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    package = name.replace("-", "_")
    info = f"{package}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: MIT\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    content = {f"{package}/__init__.py": b"raise SystemExit('the package was run')\n"}
    content |= {f"{package}/{file}": data for file, data in files.items()}
    content |= {f"{info}/METADATA": metadata.encode(), f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    record = ""
    for file, data in content.items():
        hashed = data + b"x" if spoil and file.endswith(spoil) else data
        digest = base64.urlsafe_b64encode(hashlib.sha256(hashed).digest()).rstrip(b"=").decode()
        record += f"{file},sha256={digest},{len(data)}\n"
    path = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in content.items():
            archive.writestr(file, data)
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return path
