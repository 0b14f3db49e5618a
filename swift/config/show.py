"""--show_config: every option, its value, and where the value came from."""

import json

from swift import console
from swift.config.options import Config, options_of

SECRETS = ("hub_token",)


def show(config: Config) -> None:
    """Print the table, given options first."""
    rows = []
    for field in options_of(type(config)):
        value = getattr(config, field.name)
        text = "***" if field.name in SECRETS and value else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        rows.append((field.name, text, config.sources.get(field.name, "default")))
    rows.sort(key=lambda row: row[2] == "default")
    console.table(("option", "value", "source"), rows)
