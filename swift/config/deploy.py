"""How a model is served."""

import ipaddress
from dataclasses import dataclass
from typing import Any

from swift.config.generate import GenerateConfig
from swift.config.model import ModelConfig, QuantConfig
from swift.config.options import opt
from swift.errors import ConfigError


@dataclass(kw_only=True)
class DeployConfig(GenerateConfig, QuantConfig, ModelConfig):
    """An OpenAI server."""

    host: str = opt("127.0.0.1", "address to listen on; any but loopback needs --api_key")
    port: int = opt(8000, "port to listen on; 0 takes a free one", minimum=0, maximum=65535)
    api_key: list[str] = opt(
        [], "keys of which each request needs one; a name that begins with @ is a file with one key a line", saved=False
    )
    served_model_name: list[str] = opt([], "names by which the model is asked for; by default as it is called")
    owned_by: str = opt("swift", "what /v1/models says of the owner")
    adapter_root: str | None = opt(None, "folder below which adapters may be loaded while the server runs; without it none may")
    max_queue: int = opt(256, "requests that may wait; more get status 429", minimum=0)
    max_body_mib: float = opt(8.0, "largest body of a request, in MiB", minimum=0.001)
    limit_mm_per_prompt: dict[str, Any] | None = opt(None, 'most images of a request, as a JSON object; {"image": 16} by default')
    max_pixels: int | None = opt(None, "images of more pixels (width times height) are scaled down to so many", minimum=1)
    request_timeout_s: float = opt(600.0, "longest time of an answer, in seconds", minimum=1)
    engine_timeout_s: float = opt(120.0, "an engine that says nothing for so many seconds is started again", minimum=1)
    drain_timeout_s: float = opt(60.0, "seconds that requests under way get when the server is ended", minimum=0)
    access_log: bool = opt(False, "log a line of JSON for each request: who, what route, status, seconds; never what was asked")
    ssl_keyfile: str | None = opt(None, "private key of the certificate")
    ssl_certfile: str | None = opt(None, "certificate; the server then speaks https")
    load_args: bool = opt(True, "take model and rendering options from the run that --adapters names")
    merge_lora: bool = opt(True, "merge the adapter into the weights; those given as NAME=PATH are served beside the model")

    def check(self) -> None:
        super().check()
        self.refuse_without_effect(("stream", "stop_words", "num_beams", "logprobs", "top_logprobs"), "when serving: a request says it")
        for name, count in (self.limit_mm_per_prompt or {}).items():
            if name != "image" or not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ConfigError(f"--limit_mm_per_prompt has {name}: {count}", hint='it takes a number of images: {"image": 4}')
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("--ssl_keyfile and --ssl_certfile go together", hint="give both or neither")
        if not self.api_key and not is_loopback(self.host):
            raise ConfigError(f"--host {self.host} would serve everybody without a key", hint="say --api_key KEY, or --host 127.0.0.1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
