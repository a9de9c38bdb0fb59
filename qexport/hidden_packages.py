"""Packages that must not be imported on behalf of qexport, although its dependencies import them if they can; and code
that a dependency would compile.

`kernels` downloads native code from a model hub and runs it. transformers imports it if it is installed.
bitsandbytes gets code from it as soon as bitsandbytes itself is imported on a CPU with AVX512-BF16, and PEFT imports
bitsandbytes for layers that qexport never uses.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any, Final, Literal

Package = Literal["kernels", "bitsandbytes"]

_CACHED_ANSWERS: Final[Mapping[Package, tuple[tuple[str, str], ...]]] = {
    "bitsandbytes": (
        ("peft.import_utils", "is_bnb_available"),
        ("peft.import_utils", "is_bnb_4bit_available"),
        ("transformers.utils.import_utils", "is_bitsandbytes_available"),
    ),
    "kernels": (),
}
"""Functions that remember whether a package can be imported.

The one of transformers for `kernels` is not reset: modules of transformers have been imported according to it.
"""

_MODULES: Final[dict[str, Any]] = sys.modules
_LOCK: Final = RLock()
_users: Counter[Package] = Counter()
_hidden: set[Package] = set()


@contextmanager
def hidden(package: Package) -> Iterator[None]:
    """Within the context, importing the package fails as if it were not installed.

    A package that the process has imported before stays as it is, so that programs that also use it are not
    disturbed. The contexts of several threads may overlap; the last one that ends makes the package visible again.
    Until then no thread can import it. If qexport is the first to import transformers, transformers does without
    `kernels` in this process from then on.
    """
    _enter(package)
    try:
        yield
    finally:
        _leave(package)


def _enter(package: Package) -> None:
    with _LOCK:
        _users[package] += 1
        if package not in _MODULES:
            _MODULES[package] = None  # Python's own mark for a module that cannot be imported
            _hidden.add(package)


def _leave(package: Package) -> None:
    with _LOCK:
        _users[package] -= 1
        if _users[package] or package not in _hidden:
            return
        _hidden.remove(package)
        del _MODULES[package]
        for module, function in _CACHED_ANSWERS[package]:
            if module in _MODULES:
                getattr(_MODULES[module], function).cache_clear()


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Within the context PEFT does not compile its CUDA extension for BOFT, which it tries for each layer it wraps."""
    import peft.tuners.boft.layer as module

    boft: Any = module
    before = boft._FBD_CUDA
    if before is None:
        boft._FBD_CUDA = False
    try:
        yield
    finally:
        boft._FBD_CUDA = before
