"""A user's own class, from one Python file, as a model like any other."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from serve.errors import LoadError
from serve.models.base import LoadContext, Signature

_STREAMING = ("admit", "step", "release")


class PythonClass:
    """Stands for the user's instance: what the class has, this has; what it leaves out, this leaves out."""

    signature: Signature

    def load(self, context: LoadContext) -> None:
        """Import the file, make the instance and let it load.

        Raises:
            LoadError: The file, the class or a part of it is not as `serve.models.base.Model` asks; the message says which.
        """
        if context.file is None:
            raise LoadError(
                f"a python model's source names one file; {context.folder.name!r} is a folder: add the file's name to it"
            )
        options = context.options
        module = import_file(context.file)
        found = find_class(module, options.class_name, context.file)
        where = f"{context.file.name}: {options.class_name}"
        with _told_as(where):
            instance = found(**options.arguments)
        if hasattr(instance, "load"):
            with _told_as(f"{where}.load"):
                instance.load(context)
        check_parts(instance, where)
        self._instance = instance
        self.signature = instance.signature

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._instance, name)


def import_file(file: Path) -> ModuleType:
    """Import a file under its own name, its folder first in the path so that it can import what lies beside it.

    Raises:
        LoadError: It does not import.
    """
    if file.suffix != ".py":
        raise LoadError(f"{file.name} is not a Python file")
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(f"roundhouse_model_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise LoadError(f"{file.name} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _told_as(file.name):
        spec.loader.exec_module(module)
    return module


def find_class(module: ModuleType, name: str, file: Path) -> type[Any]:
    """Return a class of a module.

    Raises:
        LoadError: There is none of this name; the message has the names that there are.
    """
    found = getattr(module, name, None)
    if inspect.isclass(found):
        return found
    own = [key for key, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__]
    there = f"it has {', '.join(own)}" if own else "it has no class"
    raise LoadError(f"options.class: {file.name} has no class {name!r}; {there}")


def check_parts(instance: Any, where: str) -> None:
    """Prove that an instance is a model.

    Raises:
        LoadError: A part is missing or of another kind.
    """
    stepped = all(callable(getattr(instance, name, None)) for name in _STREAMING)
    if not stepped and not callable(getattr(instance, "predict", None)):
        raise LoadError(f"{where} has no method predict(batch)")
    signature = getattr(instance, "signature", None)
    if signature is None:
        raise LoadError(f"{where} has no signature; give it a serve.models.base.Signature")
    if not isinstance(signature, Signature):
        raise LoadError(f"{where}.signature is a {type(signature).__name__}, and must be a serve.models.base.Signature")


@contextlib.contextmanager
def _told_as(where: str) -> Iterator[None]:
    """Turn what the user's code raises into a LoadError that names the place in it."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f" (line {last.lineno} of {Path(last.filename).name})"
        raise LoadError(f"{where}: {type(error).__name__}: {error}{place}") from error
