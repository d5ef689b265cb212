"""Sources that are on this machine already: an installed package's data, found without importing it, and a path."""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
from pathlib import Path

from serve.errors import SourceError
from serve.sources.parse import Source
from serve.sources.store import MAX_FILES


def find_package(source: Source) -> Path:
    """Return an installed package's folder, what `source.path` names in it, or a module's file; imports nothing.

    Raises:
        SourceError: The package or the path in it is not there.
    """
    name, *inner = source.root.split(".")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise SourceError(
            f"package {name!r} is not installed in {sys.prefix}; try: pip install {name.replace('_', '-')}"
        )
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    candidates = [root.joinpath(*inner, source.path) for root in roots]
    if not inner and not source.path:
        candidates += [Path(spec.origin)] if spec.origin and not roots else []
    elif inner and not source.path:
        candidates += [root.joinpath(*inner).with_suffix(".py") for root in roots]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    where = ", ".join(map(str, candidates)) or str(spec.origin)
    near = _siblings(candidates[0]) if candidates else ""
    raise SourceError(f"package {name!r} is installed and {where} is not there{near}")


def _siblings(missing: Path) -> str:
    if not missing.parent.is_dir():
        return ""
    names = sorted(entry.name for entry in missing.parent.iterdir() if not entry.name.startswith(("_", ".")))[:10]
    return f"; beside it are {', '.join(names)}" if names else ""


def find_file(source: Source, base_dir: Path) -> Path:
    """Return the folder or file that a `file:` source names, with every link in it known to stay inside.

    The named path may itself be a link; a relative one may not climb out of `base_dir` with `..`.

    Raises:
        SourceError: It is not there, leaves `base_dir`, or holds a link that leaves it, a device, a pipe or a socket.
    """
    given = Path(source.root)
    base = Path(os.path.abspath(base_dir))  # noqa: PTH100  (lexical: the named path may be a link on purpose)
    path = Path(os.path.normpath(base / given))
    if not given.is_absolute() and not path.is_relative_to(base):
        raise SourceError(f"leaves {base} with '..'; give the absolute path, file:{path}")
    try:
        real = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceError(f"{path} is not there{_siblings(path)}") from error
    except RuntimeError as error:
        raise SourceError(f"{path} is a link to itself") from error
    if real.is_dir():
        _check_tree(real)
    elif not real.is_file():
        raise SourceError(f"{real} is neither a folder nor a file")
    return real


def _check_tree(root: Path) -> None:
    seen = 0
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            seen += 1
            if seen > MAX_FILES:
                raise SourceError(f"{root} holds more than {MAX_FILES} files; name the model's own folder")
            _check_entry(Path(folder, name), root)


def _check_entry(entry: Path, root: Path) -> None:
    mode = entry.lstat().st_mode
    if stat.S_ISLNK(mode):
        target = Path(os.path.realpath(entry))
        if not target.is_relative_to(root):
            raise SourceError(f"{entry} is a link that leaves {root}, to {target}; copy the folder with cp -rL")
        if target.exists():
            mode = target.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        raise SourceError(f"{entry} is a device, a pipe or a socket; a model is files and folders")
