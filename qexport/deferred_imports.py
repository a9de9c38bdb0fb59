"""What transformers imports with every model for functions that qexport never calls."""

from __future__ import annotations

import sys
from collections.abc import MutableSequence, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

_PACKAGE: Final = "scipy.optimize"
_IMPORTED: Final = "linear_sum_assignment"
"""What transformers imports of it, in several modules, for the losses of object detection."""


def defer_scipy_optimize() -> None:
    """Saves 24 MB and 0.4 s of a process that does without it. It is for the command line, whose process is its own."""
    if _PACKAGE not in sys.modules:
        sys.modules[_PACKAGE] = _Deferred(_PACKAGE)
        sys.meta_path.insert(0, _Submodules())


class _Deferred(ModuleType):
    """Stands for the package in `sys.modules` until something else of it is used."""

    __path__: MutableSequence[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever looks through all modules asks for these
            raise AttributeError(name)
        return _linear_sum_assignment if name == _IMPORTED else getattr(_loaded(), name)


class _Submodules(MetaPathFinder, Loader):
    """Loads the package before a module inside it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{_PACKAGE}.") or not isinstance(sys.modules.get(_PACKAGE), _Deferred):
            return None
        _loaded()
        import_module(fullname)
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It has been executed."""


def _linear_sum_assignment(*arguments: Any, **options: Any) -> Any:
    return _loaded().linear_sum_assignment(*arguments, **options)


def _loaded() -> ModuleType:
    if isinstance(sys.modules.get(_PACKAGE), _Deferred):
        del sys.modules[_PACKAGE]
    return import_module(_PACKAGE)
