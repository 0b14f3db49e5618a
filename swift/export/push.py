"""Upload of an exported folder to a hub. A failure leaves the folder where it is."""

import shlex
from pathlib import Path

from swift import console, hub
from swift.config.export import ExportConfig
from swift.errors import ConfigError, HubError
from swift.model.checkpoints import adapter_folder, model_reference


def check_push(config: ExportConfig) -> None:
    """Whether the upload can succeed, asked before hours of work: the hub is there, and the token is right.

    Raises ConfigError for an id that is none, HubError if the hub cannot be reached or refuses.
    """
    hub.check_push(config.hub_model_id or "", use_hf=config.use_hf, token=config.hub_token)


def push(folder: Path, config: ExportConfig) -> None:
    """Upload ``folder`` to --hub_model_id. HubError says how to upload it later; what has arrived is not sent again."""
    try:
        address = hub.push(
            folder,
            config.hub_model_id or "",
            use_hf=config.use_hf,
            token=config.hub_token,
            private=config.hub_private_repo,
            commit_message=config.commit_message,
        )
    except HubError as problem:
        hint = "; ".join(filter(None, [problem.hint, f"{folder} stays; upload it later: {_again(folder, config)}"]))
        raise HubError(problem.message, hint=hint) from problem
    console.say(f"uploaded {folder} to {address}")


def _again(folder: Path, config: ExportConfig) -> str:
    """The command that uploads ``folder`` to the same place, as private as it was meant to be; without the token."""
    words = [
        "swift",
        "export",
        "--adapters" if config.adapters and config.uploads_only else "--model",
        str(folder),
        "--push_to_hub",
        "true",
    ]
    for name in ("hub_model_id", "use_hf", "hub_private_repo", "commit_message"):
        value = getattr(config, name)
        if config.given(name):
            words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(words)


def upload_as_it_is(config: ExportConfig) -> Path:
    """Upload the adapter of --adapters, or the folder of --model, without writing anything; the folder."""
    if config.adapters:
        folder = adapter_folder(config.adapters[0])
        console.notice(f"the adapter {folder} is uploaded as it is; --merge_lora true uploads the merged model")
        _warn_of_local_base(folder)
    else:
        folder = Path(model_reference(config.model or ""))
        if not folder.is_dir():
            raise ConfigError(f"--push_to_hub true uploads a folder, and {config.model} is none", hint="name a folder, or say what to make")
    push(folder, config)
    return folder


def _warn_of_local_base(folder: Path) -> None:
    from swift.tuner.adapter import adapter_settings

    base = str(adapter_settings(folder).get("base_model_name_or_path") or "")
    if Path(base).is_dir():
        console.warn(
            f"the adapter names the folder {base} as its base, which others do not have: --merge_lora true uploads the whole model"
        )
