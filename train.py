"""The script that launchers start: ``deepspeed train.py ...`` and ``torchrun train.py ...`` do what ``swift sft ...`` does.

Another command of swift is named first: ``torchrun train.py pt ...``.
"""

import os
import sys

from swift.cli import main


def command(words: list[str]) -> list[str]:
    """The words after ``swift``. DeepSpeed's launcher puts --local_rank before everything, and says it in the environment too."""
    rest = [word for word in words if not word.replace("-", "_").startswith("__local_rank=")]
    is_named = bool(rest) and not rest[0].startswith("-")
    return rest if is_named else ["sft", *rest]


if __name__ == "__main__":
    if "LOCAL_SIZE" in os.environ:  # DeepSpeed's launcher has this name for it
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    main(command(sys.argv[1:]))
