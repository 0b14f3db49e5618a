"""Engines: what turns prompts into answers. One contract (base.py), a folder or file for each.

A member makes an engine of a Source (source.py); whether that reads the weights into torch is its own affair.
"""

from swift.registry import Registry

ENGINES = Registry(
    "engine",
    {
        "native": "swift.engine.load:make_native",
        "transformers": "swift.engine.load:make_transformers",
        "openvino": "swift.engine.openvino.engine:make",
        "llamacpp": "swift.engine.llamacpp:make",
        "remote": "swift.engine.remote:make",
        "vllm": "swift.engine.vllm:make",
        "sglang": "swift.engine.sglang:make",
        "lmdeploy": "swift.engine.lmdeploy:make",
    },
    group="swift.engine",
)
