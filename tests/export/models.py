"""Folders of small models, and options of an export."""

from tests.families import build
from tests.tiny import make_tokenizer

from swift.config.export import ExportConfig
from swift.model.artifact import ModelFolder
from swift.quantize.measure import Reference

PIECES = [[5, 6, 7, 8, 9, 10, 11, 12] * 5, [3, 20, 40, 60, 80, 100, 120, 140, 160] * 3]


def saved(path, family, **options):
    """A small model of ``family`` with a tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    build(family, vocab_size=320, **options).save_pretrained(path)
    make_tokenizer(path)
    return ModelFolder(path, family)


def config(to, **options):
    return ExportConfig(model="m", to=to, **options)


def exported(exporter, model, tmp_path, to, **options):
    """The artifact, and what ``verify`` measures."""
    options = config(to, **options)
    folder = tmp_path / "made"
    folder.mkdir()
    exporter.check(model, options)
    artifact = exporter.run(model, options, folder)
    return artifact, exporter.verify(artifact, Reference(model, PIECES), options)


def greedy(model, prompt, count):
    """``count`` tokens that transformers answers, greedily and past any end."""
    import torch

    from swift.model.load import load_model

    loaded = load_model(model.path, torch_dtype="float32", device="cpu").model
    made = loaded.generate(torch.tensor([prompt]), do_sample=False, min_new_tokens=count, max_new_tokens=count)
    return made[0, len(prompt) :].tolist()
