"""Packages that must not be imported on behalf of qexport, although its dependencies import them where they can.

`kernels` downloads native code from a model hub and runs it. transformers imports it where it is installed.
bitsandbytes asks it for code as soon as bitsandbytes itself is imported on a CPU with AVX512-BF16, and PEFT imports
bitsandbytes for layers that qexport never has.
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

That of transformers for `kernels` keeps its answer: modules of transformers have already been imported accordingly.
"""

_MODULES: Final[dict[str, Any]] = sys.modules
_LOCK: Final = RLock()
_users: Counter[Package] = Counter()
_hidden: set[Package] = set()


@contextmanager
def hidden(package: Package) -> Iterator[None]:
    """As long as the context lasts, importing the package fails as if it were not installed.

    A package that the process has imported before stays as it is, so that programs that use it besides qexport are not
    disturbed. The contexts of several threads may overlap; the last one that ends makes the package visible again.
    Until then no thread can import it. Where qexport is what imports transformers first, transformers does without
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
