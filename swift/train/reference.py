"""What a policy is compared with: the model as it was before training, or another one, or what that has said before.

Where an adapter is trained, the reference costs no memory: it is the same model without the adapter, or with a frozen one
beside it. Where the weights themselves change, it is a second model, or its log-probabilities, computed once and kept on disk.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from swift import console, hub
from swift.config.commands import RlhfConfig, SftConfig
from swift.data.encoded import Encoded
from swift.engine.load import quantization
from swift.errors import ConfigError
from swift.files import new_file
from swift.hub.cache import cache_root
from swift.model.batch import Batch
from swift.model.checkpoints import adapter_folder, model_reference
from swift.model.load import Loaded, load_model
from swift.model.norms import use_lean_norms
from swift.model.policy import Policy, evaluating
from swift.model.template import read_template
from swift.objectives import OBJECTIVES
from swift.objectives.base import Objective, Reference
from swift.parallel.base import Strategy
from swift.parallel.world import World
from swift.train.steps import Cutting, cut_by_tokens
from swift.tuner.adapter import adapter_settings, with_adapter
from swift.tuner.switch import switchable, with_adapter_named, without_adapter

ADAPTER = "reference"  # the name of a frozen adapter beside the one that is trained
FORMAT_VERSION = 1

Switch = Callable[[], contextlib.AbstractContextManager[None]]


class Frozen:
    """The reference of an objective: ``policy`` in evaluation mode and without gradients, within what ``switch`` opens."""

    def __init__(self, policy: Policy, switch: Switch = contextlib.nullcontext) -> None:
        self.policy, self._switch = policy, switch
        self._device = policy.inner.get_input_embeddings().weight.device.type

    def logps(self, batch: Batch) -> Tensor:
        """(num_documents,) float32: the sum of weight times log p over the predictions of each document."""
        with self._still():
            return self.policy.logps(batch)

    def own(self, batch: Batch) -> Batch:
        """As of ``Policy``."""
        return self.policy.own(batch)

    def decode(self, batch: Batch) -> Tensor:
        """As of ``Policy``: the hidden states that a stage hands on."""
        with self._still():
            return self.policy.decode(batch)

    @contextlib.contextmanager
    def root(self, ids_P: Tensor | None, document_length: int | None = None) -> Iterator[None]:
        """Within, batches continue ``ids_P``, which are computed once, here."""
        with contextlib.ExitStack() as opened:
            with self._still():
                opened.enter_context(self.policy.root(ids_P, document_length))
            yield

    @contextlib.contextmanager
    def _still(self) -> Iterator[None]:
        is_on, dtype = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)
        # Autocast would keep weights that it has cast here, without a graph, and use them for the policy.
        with (
            torch.no_grad(),
            self._switch(),
            evaluating(self.policy.model),
            torch.autocast(self._device, dtype, is_on, cache_enabled=False),
        ):
            yield


def make_objective(config: SftConfig) -> Objective:
    """What ``config`` minimises."""
    if not isinstance(config, RlhfConfig):
        objective: Objective = OBJECTIVES.get("sft")()
        return objective
    assert config.beta is not None and config.loss_type is not None
    objective = OBJECTIVES.get(config.rlhf_type)(
        loss_type=config.loss_type,
        loss_weights=config.loss_weights,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        discopop_tau=config.discopop_tau,
        rpo_alpha=config.rpo_alpha,
        reference_free=config.reference_free,
    )
    return objective


def kind_of_reference(config: SftConfig) -> str:
    """What the reference is: "none"; "base", the model without its adapter; "adapter", it with a frozen one; "model", a second one."""
    if not isinstance(config, RlhfConfig) or config.reference_free:
        return "none"
    if config.ref_model is not None or config.changes_base:
        return "model"
    if not config.ref_adapters:
        return "base"
    is_lora = adapter_settings(adapter_folder(config.ref_adapters[0])).get("peft_type") == "LORA"
    return "adapter" if is_lora and config.tuner_type == "lora" else "model"


def reference_text(config: RlhfConfig) -> str:
    """The reference in words."""
    adapter = f" with the adapter {config.ref_adapters[0]}" if config.ref_adapters else ""
    text = {
        "none": "none: all answers are thought equally likely before training",
        "base": "the model without its adapter",
        "adapter": f"the model{adapter}",
        "model": f"a second model, {config.ref_model or config.model}{adapter}",
    }[kind_of_reference(config)]
    return f"{text}; computed once, before training" if config.precompute_ref_log_probs else text


def find_reference(config: SftConfig, snapshot: hub.Snapshot) -> hub.Snapshot | None:
    """Where the second model is, if there is one: ``snapshot``, the model's own, or --ref_model. Raises before data is read."""
    if kind_of_reference(config) == "none":
        return None
    assert isinstance(config, RlhfConfig)
    if config.ref_model is None:
        return snapshot
    name, revision = model_reference(config.ref_model), config.ref_model_revision
    return hub.resolve(name, revision, use_hf=config.use_hf, token=config.hub_token, offline=config.offline)


def load_second_model(config: SftConfig, loaded: Loaded, path: Path | None) -> Any:
    """The reference in ``path`` as a model of its own, in the precision of ``loaded``; None if none is needed.

    Before training, ``loaded`` is its own reference: log-probabilities that are computed then need no second one.
    """
    if path is None or not isinstance(config, RlhfConfig):
        return None
    is_own = config.ref_model is None and not config.ref_adapters
    if config.precompute_ref_log_probs and is_own:
        return None
    if not config.precompute_ref_log_probs and kind_of_reference(config) != "model":
        return None
    if not config.precompute_ref_log_probs:
        console.notice("the reference is a second model in memory; --precompute_ref_log_probs true needs it before training alone")
    second = load_model(
        path,
        torch_dtype=str(loaded.dtype).removeprefix("torch."),
        attn_impl=config.attn_impl,
        device=str(loaded.device),
        quantization=quantization(config),
        chat_template=read_template(config.chat_template),
    )
    if second.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise ConfigError(f"--ref_model {config.ref_model} has other tokens than the model", hint="both have to read the same tokens")
    model = second.model
    if config.ref_adapters:
        model = with_adapter(model, adapter_folder(config.ref_adapters[0]))
    if not config.torch_compile:
        use_lean_norms(model)
    return model.requires_grad_(False).eval()


def add_reference_adapter(config: SftConfig, model: Any) -> None:
    """Put the frozen adapter beside the trained one of ``model``, if that is the reference."""
    if not isinstance(config, RlhfConfig) or config.precompute_ref_log_probs or kind_of_reference(config) != "adapter":
        return
    model.load_adapter(str(adapter_folder(config.ref_adapters[0])), adapter_name=ADAPTER, is_trainable=False)


def make_reference(config: SftConfig, policy: Policy, second: Any, place: Callable[[Any], Any]) -> Reference | None:
    """The reference of a run, computed beside ``policy`` or by the ``second`` model; None if none is while training.

    ``place`` gives what this process has of a frozen model, on its device.
    """
    kind = kind_of_reference(config)
    if kind == "none" or (isinstance(config, RlhfConfig) and config.precompute_ref_log_probs):
        return None
    if kind == "model":
        return Frozen(Policy(place(second)))
    if kind == "base" and hasattr(policy, "without_adapter"):  # the layers are another library's
        found: Reference = policy.without_adapter()
        return found
    modules = switchable(policy.model)
    switch: Switch = lambda: without_adapter(modules) if kind == "base" else with_adapter_named(modules, ADAPTER)  # noqa: E731
    return Frozen(Policy(policy.model, call=policy.call), switch)


def precompute(
    model: Any,
    rows: Sequence[Encoded],
    *,
    cutting: Cutting,
    strategy: Strategy,
    collate: Callable[[Sequence[list[Any]]], list[Batch]],
    device: torch.device,
    is_flat: bool,
    world: World,
) -> None:
    """Give ``rows`` the log-probabilities that ``model``, whole and on ``device``, has for them.

    They come from the cache, or are computed by all processes together.

    The cache knows them by a digest of the weights, the config and the tokens, and of nothing that is merely called the same.
    """
    frozen = Frozen(Policy(model))
    weights = digest_of(model) if world.is_main else ""  # which alone looks into the cache
    with strategy.autocast():
        precision = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "as weights"
    for encoded in rows:
        name = hashlib.sha256(" ".join([str(FORMAT_VERSION), weights, encoded.digest(), precision]).encode()).hexdigest()
        path = cache_root() / "reference_logps" / f"{name}.npy"
        found = world.broadcast(_read(path, len(encoded)) if world.is_main else None)
        if found is None:
            found = np.zeros((len(encoded), 2), np.float32)
            groups = _groups(encoded, cutting, is_flat=is_flat)[world.rank :: world.size]
            for group in groups:
                [batch] = collate([[encoded[row] for row in group]])
                with strategy.autocast():
                    found[group] = frozen.logps(batch.to(device)).view(-1, 2).cpu().numpy()
            found = np.sum(world.gather(found), axis=0, dtype=np.float32)  # each row was computed by one of them
            if world.is_main:
                with new_file(path) as temporary, temporary.open("wb") as file:
                    np.save(file, found)
        encoded.reference_logps = found


def _groups(encoded: Encoded, cutting: Cutting, *, is_flat: bool) -> list[list[int]]:
    """The rows of each forward pass."""
    rows = sorted(range(len(encoded)), key=lambda row: -encoded.lengths[row])
    if is_flat:
        return cut_by_tokens(rows, encoded.lengths, cutting.tokens(int(encoded.lengths.max())))
    return [rows[at : at + cutting.rows_per_batch] for at in range(0, len(rows), cutting.rows_per_batch)]


def _read(path: Path, count: int) -> npt.NDArray[np.float32] | None:
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    is_whole = isinstance(found, np.ndarray) and found.shape == (count, 2) and bool(np.isfinite(found).all())
    return found if is_whole else None


def digest_of(model: Any) -> str:
    """Of all weights of ``model``, of their names, and of what its config and that of its adapter make of them."""
    sha = hashlib.sha256(model.config.to_json_string().encode())
    for name, config in sorted(getattr(model, "peft_config", {}).items()):
        sha.update(json.dumps([name, config.to_dict()], sort_keys=True, default=lambda value: sorted(map(str, value))).encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data if tensor.numel() else b"")
    return sha.hexdigest()
