"""The file of certificate authorities that the environment names for TLS, checked before a library trips over it."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qexport.errors import RecipeError

OF_HUBS: Final = ("SSL_CERT_FILE",)
OF_REGISTRIES: Final = (*OF_HUBS, "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""The variables, in the order in which the client looks at them."""


def named_authorities(variables: Sequence[str]) -> str | None:
    """The file or folder of authorities to trust; None for those that certifi knows.

    Args:
        variables: `OF_HUBS` or `OF_REGISTRIES`.

    Raises:
        RecipeError: a variable names one that is missing, cannot be read, or holds no certificates.
    """
    variable = next((name for name in variables if os.environ.get(name)), None)
    if variable is None:
        return None
    path = Path(os.environ[variable])
    try:
        if path.is_dir():
            _refuse_empty(path)
        else:
            ssl.create_default_context(cafile=path)
    except OSError as error:  # an SSLError is one too
        reason = "it holds no certificates" if isinstance(error, ssl.SSLError) else error.strerror
        kind, mend = ("folder", "folder that c_rehash has made") if path.is_dir() else ("file", "PEM file")
        raise RecipeError(
            f"{variable} names a {kind} of certificate authorities that cannot be used: {reason}",
            where=str(path),
            mend=f"name a {mend} with certificates, or unset {variable}",
        ) from error
    return str(path)


_HASHED: Final = re.compile(r"[0-9a-f]{8}\.\d+")
"""The names by which OpenSSL looks for certificates in a folder; it sees no others."""


def _refuse_empty(folder: Path) -> None:
    if not any(_HASHED.fullmatch(path.name) and path.is_file() for path in folder.iterdir()):
        raise ssl.SSLError("no certificates")
