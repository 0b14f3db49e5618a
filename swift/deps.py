"""Optional packages: import one, or say which command installs it."""

import importlib
from types import ModuleType

from swift.errors import DependencyError


def require(module: str, *, extra: str | None = None, package: str | None = None) -> ModuleType:
    """Import ``module``; raise DependencyError naming the install command if it is absent.

    ``extra`` is the extra of this project that brings it, ``package`` its name on PyPI if that
    differs from the module's.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        what = f"'swift-llm[{extra}]'" if extra else (package or module.split(".")[0])
        raise DependencyError(f"the package {package or module} is not installed", hint=f"pip install {what}") from None
