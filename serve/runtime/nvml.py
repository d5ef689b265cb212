"""NVIDIA's library by the binding that Ray brings, without importing Ray: what tells a node's metrics stays small."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

_BINDING = Path("_private", "thirdparty", "pynvml", "pynvml.py")


def binding() -> Any:
    """Return the module `pynvml`; the library itself need not be there."""
    package = importlib.util.find_spec("ray")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("Ray is not installed")
    found = importlib.util.spec_from_file_location("roundhouse_pynvml", Path(package.origin).parent / _BINDING)
    if found is None or found.loader is None:
        raise ModuleNotFoundError("Ray has no pynvml")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # where it looks for itself
    found.loader.exec_module(module)
    return module
