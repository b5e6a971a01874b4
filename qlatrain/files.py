"""Files and folders that are either there whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class WriteError(RuntimeError):
    """The system refused to write; the message says what and why."""


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Around what writes `target`: a full disk, a missing right and the like become a WriteError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{target} could not be written: {error}") from error


def make_folder(folder: Path) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def folder_written_aside(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`; at the end it takes `target`'s place in one rename.

    On an error nothing of it stays, and what was at `target` is untouched.

    Raises:
        WriteError: the system refused.
    """
    aside = target.parent / f".{target.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(target):
            aside.mkdir(parents=True)
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():
                    _sync(file)
            _sync(aside)
            retired = target.parent / f".{target.name}.retired"
            shutil.rmtree(retired, ignore_errors=True)
            if target.exists():
                os.replace(target, retired)
            os.replace(aside, target)
            _sync(target.parent)
            shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_aside(target: Path, text: str) -> None:
    """Writes a text file in one rename; WriteError when the system refuses."""
    aside = target.parent / f".{target.name}.partial"
    try:
        with writing(target):
            aside.write_text(text, encoding="utf-8")
            _sync(aside)
            os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def write_json(target: Path, content: dict) -> None:
    write_aside(target, json.dumps(content, indent=2) + "\n")


def _sync(path: Path) -> None:
    """Asks the operating system to put a file or folder on the disk before the rename that reveals it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
