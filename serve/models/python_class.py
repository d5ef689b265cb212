"""A user's own class as a model, checked as it loads, so that what is wrong with it is said before it serves."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_args

import numpy as np

from serve.errors import LoadError, RoundhouseError
from serve.models.base import Datatype, Item, LoadContext, Signature, TensorSpec
from serve.models.devices import use_numpy_threads, use_threads
from serve.spec import PythonOptions

T = TypeVar("T")

#: What a user's class may add to `signature`, `load` and `predict`; see `Model` and `SteppedModel`.
_PREDICTING = ("predict", "prepare", "cost", "stream", "close")
_STEPPED = ("slots", "prepare", "admit", "step", "release", "close")


class PythonClass:
    """A `Model` (or a `SteppedModel`, where the class has `admit`, `step` and `release`) that a user wrote.

    After `load` it has what the user's object has, and no more: what a model may leave out stays left out.
    """

    signature: Signature

    def load(self, context: LoadContext) -> None:
        """Import the source's file, construct the class with its arguments and load it.

        Raises:
            LoadError: The file does not import, there is no such class, its arguments do not fit, it lacks `predict` or
                a `signature`, or its `load` raises.
        """
        options: PythonOptions = context.options
        use_numpy_threads(context.threads)
        path, name = _locate(context, options.class_name)
        module = _import(path)
        _limit_torch(context.threads)
        model = _construct(_find_class(module, name, path), options, path)
        members = _check_members(model, name)
        if hasattr(model, "load"):
            _run(lambda: model.load(context), f"{name}.load", path)
            _limit_torch(context.threads)
        self.signature = _checked_signature(getattr(model, "signature", None), name)
        self.padded = bool(getattr(model, "padded", False))
        for member in members:
            setattr(self, member, getattr(model, member))


def _locate(context: LoadContext, class_name: str) -> tuple[Path, str]:
    """Return the file and the class's name: `Class` of a source that is a file, `module.Class` of a folder."""
    module, _, name = class_name.rpartition(".")
    if context.file is not None:
        if context.file.suffix != ".py":
            raise LoadError(f"the source names {context.file}; a Python file (.py) or its folder is wanted")
        if module:
            raise LoadError(f"options.class is {class_name!r}; the source is a file already, so {name!r} is enough")
        return context.file, name
    if not module:
        raise LoadError(
            f"options.class is {class_name!r} and the source is a folder; write the file as well, as in 'model.{name}' "
            f"for model.py, or let the source name the file{_python_files(context.folder)}"
        )
    path = context.folder.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        raise LoadError(f"options.class is {class_name!r}, and {path} is not there{_python_files(context.folder)}")
    return path, name


def _python_files(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.py"))[:10]
    return f"; in the folder are {', '.join(names)}" if names else ""


def _import(path: Path) -> ModuleType:
    """Run a file as a module: under its full name where it belongs to a package, so that relative imports work."""
    root, name = path.parent, path.stem
    while (root / "__init__.py").is_file():
        root, name = root.parent, f"{root.name}.{name}"
    if str(root) not in sys.path:
        sys.path.append(str(root))  # after the platform's own modules, which a file of a user must not replace
    return _run(lambda: importlib.import_module(name) if "." in name else _import_file(path), "its import", path)


def _import_file(path: Path) -> ModuleType:
    """Import under a name of its own: a file may be called like a module that is there already."""
    name = f"user_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _find_class(module: ModuleType, name: str, path: Path) -> type:
    found = getattr(module, name, None)
    if isinstance(found, type):
        return found
    if found is not None:
        raise LoadError(f"options.class: {name!r} in {path} is no class but a {type(found).__name__}")
    own = [key for key, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__]
    near = difflib.get_close_matches(name, own, n=1)
    if near:
        hint = f"; did you mean {near[0]!r}?"
    else:
        hint = f"; its classes are {', '.join(own)}" if own else "; it defines none"
    raise LoadError(f"options.class: {path} has no class {name!r}{hint}")


def _construct(user_class: type, options: PythonOptions, path: Path) -> Any:
    try:
        inspect.signature(user_class).bind(**options.arguments)
    except TypeError as error:
        takes = inspect.signature(user_class)
        given = ", ".join(options.arguments) or "nothing"
        raise LoadError(
            f"options.arguments do not fit {user_class.__name__}{takes}: {error}; given is {given}"
        ) from error
    return _run(lambda: user_class(**options.arguments), f"{user_class.__name__}()", path)


def _check_members(model: Any, name: str) -> list[str]:
    """Return what the object has of what a model may have; each must be what the host will call."""
    stepped = all(hasattr(model, member) for member in ("admit", "step", "release"))
    if not stepped and not hasattr(model, "predict"):
        near = difflib.get_close_matches("predict", [member for member in dir(model) if member[0] != "_"], n=1)
        hint = f"; did you mean {near[0]!r} to be it?" if near else ""
        raise LoadError(f"{name} has no method predict(self, batch){hint}")
    if stepped and not (hasattr(model, "slots") and hasattr(model, "prepare")):
        raise LoadError(f"{name} has admit, step and release, and so needs slots and prepare, too; see SteppedModel")
    members = [member for member in (_STEPPED if stepped else _PREDICTING) if hasattr(model, member)]
    for member in [*members, *(["load"] if hasattr(model, "load") else [])]:
        if member != "slots":
            _check_callable(getattr(model, member), f"{name}.{member}", takes=0 if member in ("step", "close") else 1)
    return members


def _check_callable(method: Any, name: str, *, takes: int) -> None:
    if not callable(method):
        raise LoadError(f"{name} is no method but a {type(method).__name__}")
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
        raise LoadError(f"{name} is async; models run on a thread of their own, so write a plain def")
    try:
        inspect.signature(method).bind(*[None] * takes)
    except TypeError as error:
        wanted = "no argument" if takes == 0 else "one argument"
        raise LoadError(f"{name} takes {inspect.signature(method)} after self; {wanted} is what it gets") from error
    except ValueError:
        return  # a method of a compiled class does not tell what it takes


def _checked_signature(signature: Any, name: str) -> Signature:
    if signature is None:
        raise LoadError(
            f"{name} has no signature; give it one, such as "
            "signature = Signature.of({'x': 'FP32 [-1, 3]: what it means'}, {'y': 'FP32 [-1]: what it means'})"
        )
    if not isinstance(signature, Signature):
        raise LoadError(
            f"{name}.signature is a {type(signature).__name__}; "
            "a serve.models.base.Signature is wanted, which Signature.of(inputs, outputs) makes"
        )
    for kind in ("inputs", "outputs"):
        _check_tensors(getattr(signature, kind), f"{name}.signature.{kind}")
    if signature.example is None:
        return signature
    return replace(signature, example=_checked_example(signature, f"{name}.signature.example"))


def _checked_example(signature: Signature, place: str) -> Item:
    """Return the example as requests come: numbers as numpy's of the datatype, BYTES as bytes."""
    example = signature.example or {}
    tensors = {tensor.name: tensor for tensor in signature.inputs}
    unknown = [str(key) for key in example if key not in tensors and key != "parameters"]
    missing = [tensor.name for tensor in signature.inputs if tensor.name not in example and not tensor.optional]
    if missing:
        raise LoadError(f"{place} lacks {', '.join(missing)}")
    if unknown:
        raise LoadError(f"{place} holds {', '.join(unknown)}, which is no input")
    return {key: _as_row(value, tensors[key], place) if key in tensors else value for key, value in example.items()}


def _as_row(value: Any, tensor: TensorSpec, place: str) -> Any:
    if tensor.datatype == "BYTES":
        return value.encode() if isinstance(value, str) else value
    try:
        row = np.asarray(value).astype(tensor.datatype.lower().replace("fp", "float"))
    except (TypeError, ValueError) as error:
        raise LoadError(f"{place}: {tensor.name} is no {tensor.datatype}: {error}") from error
    if row.ndim != len(tensor.shape) - 1:
        raise LoadError(
            f"{place}: {tensor.name} has the shape {row.shape}; an example is one row, so it lacks the first dimension "
            f"of {list(tensor.shape)}"
        )
    return row if row.ndim else row[()]


def _check_tensors(tensors: Any, place: str) -> None:
    if not tensors or not all(isinstance(tensor, TensorSpec) for tensor in tensors):
        raise LoadError(f"{place} is {tensors!r}; a tuple of one TensorSpec or more is wanted")
    names = [tensor.name for tensor in tensors]
    for tensor in tensors:
        if not isinstance(tensor.name, str) or not tensor.name or names.count(tensor.name) > 1:
            raise LoadError(f"{place} names a tensor {tensor.name!r}; names are text, and each is there once")
        if tensor.datatype not in get_args(Datatype):
            near = difflib.get_close_matches(str(tensor.datatype), get_args(Datatype), n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise LoadError(f"{place}: {tensor.name} has the datatype {tensor.datatype!r}{hint}")
        if (
            not tensor.shape
            or tensor.shape[0] != -1
            or not all(type(size) is int and size >= -1 for size in tensor.shape)
        ):
            raise LoadError(
                f"{place}: {tensor.name} has the shape {tensor.shape!r}; "
                "whole numbers are wanted, the first of them -1, which is the batch"
            )


def _limit_torch(threads: int) -> None:
    """Hold torch to the replica's threads where the user's file has imported it."""
    if "torch" in sys.modules:
        use_threads(threads)


def _run(call: Callable[[], T], what: str, path: Path) -> T:
    """Call the user's code; what it raises becomes a LoadError that tells where in the user's file it did."""
    try:
        return call()
    except RoundhouseError:
        raise
    except (Exception, SystemExit) as error:
        raise LoadError(f"{path}: {what} failed: {type(error).__name__}: {error}{_line(error, path)}") from error


def _line(error: BaseException, path: Path) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return f" (line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
