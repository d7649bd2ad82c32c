"""Files that are written whole or not at all, on the local disk or wherever fsspec reaches.

A local file is written under a temporary name in the same folder, flushed to the disk and renamed over the old one, so
that a process that is killed at any moment leaves the old file or the new one. Remote files are written inside an
fsspec transaction, as Lightning's checkpoints are.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

__all__ = [
    "AnyPath",
    "file_exists",
    "folder_exists",
    "is_remote",
    "join",
    "make_folder",
    "normal",
    "parent",
    "path_or_url",
    "read_bytes",
    "upload",
    "write_bytes",
]

AnyPath = str | PathLike[str]  # a local path, or a URL such as "s3://bucket/folder"


def join(folder: AnyPath, name: str) -> str:
    """The path of a file in a folder."""
    return f"{os.fspath(folder).rstrip('/')}/{name}" if os.fspath(folder) != "/" else f"/{name}"


def parent(path: AnyPath) -> str:
    """The folder that a file is in."""
    return os.path.dirname(os.fspath(path)) or "."


def normal(path: AnyPath) -> Path | str:
    """A Path for local files; a URL stays a string, since Path would merge its slashes."""
    filesystem, inner = url_to_fs(os.fspath(path))
    return Path(inner) if isinstance(filesystem, LocalFileSystem) else os.fspath(path)


def is_remote(path: AnyPath) -> bool:
    """Whether a path is a URL of another file system than the local one.

    Raises:
        ImportError: if the file system needs a package that is not installed.
        ValueError: if it is not known.
    """
    return "://" in os.fspath(path) and not isinstance(url_to_fs(os.fspath(path))[0], LocalFileSystem)


def path_or_url(path: AnyPath) -> Path | str:
    """A Path for what is local, absolute or not; a URL stays a string."""
    return normal(path) if "://" in os.fspath(path) else Path(path)


def folder_exists(path: AnyPath) -> bool:
    """Whether a path is a folder."""
    filesystem, inner = url_to_fs(os.fspath(path))
    return bool(filesystem.isdir(inner))


def file_exists(path: AnyPath) -> bool:
    """Whether a path is a file."""
    filesystem, inner = url_to_fs(os.fspath(path))
    return bool(filesystem.isfile(inner))


def make_folder(path: AnyPath) -> None:
    """Create a folder with its parents.

    Raises:
        OSError: if it cannot be created; the message names the folder and the cause.
    """
    filesystem, inner = url_to_fs(os.fspath(path))
    with _cause_named("create the folder", path):
        filesystem.makedirs(inner, exist_ok=True)


def read_bytes(path: AnyPath) -> bytes:
    """The content of a file.

    Raises:
        OSError: if it cannot be read; the message names the file and the cause.
    """
    filesystem, inner = url_to_fs(os.fspath(path))
    with _cause_named("read", path), filesystem.open(inner, "rb") as file:
        content: bytes = file.read()
    return content


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: if it cannot be written (disk full, no permission, read-only); the message names the file and the
            cause. An older file of the same name is then still there.
    """
    filesystem, inner = url_to_fs(os.fspath(path))
    with _cause_named("write", path):
        if isinstance(filesystem, LocalFileSystem):
            _write_local(Path(inner), content)
        else:
            with filesystem.transaction, filesystem.open(inner, "wb") as file:
                file.write(content)


def upload(folder: Path, url: AnyPath) -> None:
    """Write all files of a local folder, and of those in it, below a URL.

    Raises:
        OSError: if a file cannot be written.
    """
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        target = join(url, file.relative_to(folder).as_posix())
        make_folder(parent(target))
        write_bytes(target, file.read_bytes())


def _write_local(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    # not every system lets a folder be opened or flushed; the rename itself has happened
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _cause_named(what: str, path: AnyPath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error) or type(error).__name__
        # with an errno, OSError picks the fitting subclass, such as PermissionError
        if error.errno is None:
            raise OSError(f"cannot {what} {os.fspath(path)!r}: {cause}") from error
        raise OSError(error.errno, f"cannot {what} {os.fspath(path)!r}: {cause}") from error
