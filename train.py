"""The script that launchers start: ``deepspeed train.py ...`` and ``torchrun train.py ...`` do what ``swift sft ...`` does.

Another command of swift is named first: ``torchrun train.py pt ...``.
"""

import os
import sys

from swift.cli import main


def command(words: list[str]) -> list[str]:
    """The words after ``swift``. DeepSpeed's launcher puts --local_rank before everything."""
    ranks = [word for word in words if word.startswith(("--local_rank=", "--local-rank="))]
    rest = [word for word in words if word not in ranks]
    is_named = bool(rest) and not rest[0].startswith("-")
    return [*([] if is_named else ["sft"]), *rest, *(word.replace("-", "_").replace("__", "--", 1) for word in ranks)]


if __name__ == "__main__":
    if "LOCAL_SIZE" in os.environ:  # DeepSpeed's launcher has this name for it
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    main(command(sys.argv[1:]))
