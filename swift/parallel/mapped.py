"""The files of swift.model.mapped for the processes of a run, while each of them still has the whole model before it."""

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from swift.errors import MachineError
from swift.files import explain_os_errors
from swift.hub.cache import cache_root
from swift.model.mapped import MappedWeights
from swift.parallel.world import World

LOCK = "lock"


@contextlib.contextmanager
def mapped_weights(world: World, *, is_needed: bool = True) -> Iterator[MappedWeights | None]:
    """Where weights go that are loaded within: files that the processes of this machine share; None if its first says they need none.

    All processes of ``world`` come to it. The files are gone when the block ends; what is mapped stays as long as it is used.
    """
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        problem: MachineError | None = None
        if world.local_rank == 0 and is_needed:
            try:
                folder = stack.enter_context(_folder(cache_root() / "mapped"))
            except MachineError as caught:
                problem = caught
        place, has_failed = world.of_machine((folder, problem is not None))
        if problem is not None:
            raise problem
        if has_failed:
            raise SystemExit(1)  # the first process of the machine says what happened
        yield MappedWeights(place) if place is not None else None
        world.barrier()


@contextlib.contextmanager
def _folder(root: Path) -> Iterator[Path]:
    """A new folder in ``root``, removed in the end; those that processes which were killed have left go too."""
    with explain_os_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        for old in root.iterdir():
            with contextlib.suppress(OSError), (old / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not while its process lives
                shutil.rmtree(old)
        path = Path(tempfile.mkdtemp(dir=root))
        file = (path / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield path
    finally:
        file.close()
        shutil.rmtree(path, ignore_errors=True)
