"""The signature over everything in a release, made and checked offline with OpenSSF model-signing. Needs the extra
`release`.

A private key is read where it lies; neither it nor its password goes anywhere else.
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from model_signing import hashing, signing, verifying

from qexport.artifact.manifest import SIGNATURE_NAME
from qexport.errors import InputError, RecipeError

PASSWORD: Final = "QEXPORT_SIGNING_PASSWORD"
"""The environment variable with the password of an encrypted key."""

_PRIVATE: Final = b"PRIVATE KEY-----"
_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_PUBLIC: Final = b"-----BEGIN PUBLIC KEY-----"
_LARGEST: Final = 1 << 20
"""Bytes of a key with its certificates."""

_LARGEST_SIGNATURE: Final = 1 << 26
"""It names every file of a release with its digest."""

_OF_THE_HUB: Final = ".cache/huggingface"
_MAKE_ONE: Final = "make one: openssl ecparam -name prime256v1 -genkey -noout -out release.key"


class Signer:
    """A private key that was read and found usable, before anything is made.

    Args:
        path: a PEM file with a private key on one of the NIST curves, and its certificates behind it if there are some,
            its own first.

    Raises:
        RecipeError: the file cannot be read, or holds no such key, or the password is wrong or missing.
    """

    def __init__(self, path: Path) -> None:
        content = _read(path, RecipeError)
        if _PRIVATE not in content:
            raise RecipeError("the file holds no private key", where=str(path), mend=_MAKE_ONE)
        password: Any = os.environ.get(PASSWORD)
        self._config = signing.Config()
        try:
            if _CERTIFICATE in content:
                chain = [path]
                self._config.use_certificate_signer(private_key=path, signing_certificate=path, certificate_chain=chain)
            else:
                secret = password.encode() if password is not None and b"ENCRYPTED" in content else None
                self._config.use_elliptic_key_signer(private_key=path, password=secret)
        except (ValueError, TypeError, AttributeError) as error:
            raise RecipeError(
                "the private key cannot be used for a signature: it must be an EC key on the curve P-256, P-384 or "
                f"P-521, its certificate must fit it, and {PASSWORD} must have the password of an encrypted one "
                "(one with certificates must not be encrypted)",
                where=str(path),
                mend=_MAKE_ONE,
            ) from error

    def sign(self, folder: Path) -> Path:
        """Signs every file in a folder, and writes the signature into it."""
        path = folder / SIGNATURE_NAME
        with redirect_stdout(sys.stderr):  # the library prints warnings
            self._config.set_hashing_config(_hashing()).sign(folder, path)
        return path


def verify(folder: Path, key: Path) -> None:
    """Checks the signature of a folder against every file in it.

    Args:
        folder: the release.
        key: a PEM file with the public key, or with the certificate that the signer's chain ends at.

    Raises:
        RecipeError: the key's file holds neither.
        InputError: there is no signature, it is malformed, was made with another key, or is of other bytes.
    """
    path = folder / SIGNATURE_NAME
    config = _verifier(key).set_hashing_config(_hashing())
    if not path.is_file():
        raise InputError(
            "the release is not signed",
            where=str(path),
            mend="fetch it again with its signature; do not use it if it should have one",
        )
    if path.stat().st_size > _LARGEST_SIGNATURE:
        raise InputError(
            f"the signature has more than {_LARGEST_SIGNATURE} bytes",
            where=str(path),
            mend="do not use it; fetch the release again",
        )
    try:
        with redirect_stdout(sys.stderr):
            config.verify(folder, path)
    except InvalidSignature as error:
        raise _foreign(path, key) from error
    except OSError:
        raise
    except Exception as error:  # the library raises its own errors, pydantic's, OpenSSL's and plain ones
        raise _refusal(error, path, key) from error


def _hashing() -> hashing.Config:
    """Names are relative: the library writes them into the signature. The hub's own files may come and go."""
    return hashing.Config().set_ignored_paths(paths=[SIGNATURE_NAME, _OF_THE_HUB], ignore_git_paths=True)


def _verifier(key: Path) -> verifying.Config:
    content = _read(key, RecipeError)
    if _PRIVATE in content:
        raise RecipeError(
            "this is a private key: only its owner should have it",
            where=str(key),
            mend="give the public one: openssl ec -in release.key -pubout -out release.pub",
        )
    try:
        if _CERTIFICATE in content:
            return verifying.Config().use_certificate_verifier(certificate_chain=[key])
        if _PUBLIC in content:
            return verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (ValueError, TypeError, AttributeError) as error:
        raise RecipeError("the key or certificate cannot be read", where=str(key)) from error
    raise RecipeError("the file holds neither a public key nor a certificate", where=str(key))


def _refusal(error: Exception, path: Path, key: Path) -> InputError:
    words = str(error)
    if words.startswith("Signature mismatch"):
        return InputError(
            "the signature is of other bytes than the folder's",
            where=words.removeprefix("Signature mismatch: ")[:500],
            mend="do not use it; fetch the release again",
        )
    if type(error).__name__ == "X509StoreContextError":
        return _foreign(path, key, f": {words}")
    if words.startswith("Key mismatch"):
        return _foreign(path, key)
    kind = "x509CertificateChain" if b"x509CertificateChain" in path.read_bytes() else "publicKey"
    if (kind == "publicKey") != (_PUBLIC in key.read_bytes()):
        return _foreign(path, key)
    return InputError("the signature is malformed", where=str(path), mend="do not use it; fetch the release again")


def _foreign(path: Path, key: Path, reason: str = "") -> InputError:
    return InputError(
        f"the signature was made with another key, or was changed{reason}",
        where=f"{path}, checked against {key.name}",
        mend="do not use it, unless you trust whoever has that key",
    )


def _read(path: Path, kind: type[RecipeError]) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST)
    except OSError as error:
        raise kind(f"the key cannot be read: {error.strerror}", where=str(path)) from error
