"""Exporters: a model in the form that another runtime reads. One contract (base.py), a file or folder for each."""

from swift.registry import Registry

EXPORTERS = Registry(
    "export format",
    {
        "gguf": "swift.export.gguf",
        "ollama": "swift.export.ollama",
        "onnx": "swift.export.onnx",
        "openvino": "swift.export.openvino",
        "mcore": "swift.export.mcore",
        "tensorrt": "swift.export.tensorrt",
        "tensorrt_llm": "swift.export.tensorrt_llm",
    },
    group="swift.exporter",
)
