"""What lies below the requests to a registry: timeouts, the limits of plain HTTP, waiting, and failures in words."""

from __future__ import annotations

import random
import ssl
from typing import Any, Final
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from qexport.errors import InputError
from qexport.registries.destinations import is_loopback

_TIMEOUT: Final = (10.0, 120.0)
_LONGEST_WAIT: Final = 30.0


def backoff(attempt: int) -> float:
    """Seconds to wait after an attempt (from 1): a second, doubled each time, and of that half to all at random."""
    return min(_LONGEST_WAIT, 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)


class WithTimeout(HTTPAdapter):
    """No request waits forever, not even those that oras sends itself."""

    def send(self, request: Any, **options: Any) -> requests.Response:  # type: ignore[override]
        """Sends with a timeout."""
        options["timeout"] = options.get("timeout") or _TIMEOUT
        return super().send(request, **options)


class Loopback(WithTimeout):
    """Plain HTTP never leaves this machine, by an address of the registry, a redirection or a proxy."""

    def send(self, request: Any, **options: Any) -> requests.Response:  # type: ignore[override]
        """Sends to this machine.

        Raises:
            InputError: the address is that of another.
        """
        netloc = urlsplit(request.url).netloc
        if not is_loopback(netloc):
            raise InputError("a registry sends to a place without TLS", where=netloc)
        options["proxies"] = {}  # a proxy of the environment may be another machine
        return super().send(request, **options)


def nothing_added(request: Any) -> Any:
    """Keeps requests from adding what ~/.netrc has for the host, instead of what docker's config.json has."""
    return request


def is_about_certificate(error: BaseException) -> bool:
    """Whether TLS failed because the certificate is not trusted, not because there is no TLS."""
    return any(isinstance(each, ssl.SSLCertVerificationError) for each in _chain(error))


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what it was made of; requests and urllib3 keep that in arguments, attributes and causes."""
    found: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting and len(found) < 20:
        each = waiting.pop()
        if isinstance(each, BaseException) and each not in found:
            found.append(each)
            waiting += [*each.args, getattr(each, "reason", None), each.__cause__, each.__context__]
    return found


def reason_of(error: requests.RequestException) -> str:
    """A few words on what failed. The error's own text holds addresses, with what they say about an upload."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.SSLError):
        return "the TLS connection failed"
    system = next((each for each in _chain(error) if isinstance(each, OSError) and each.strerror), None)
    return f"no connection ({system.strerror})" if system else "the connection broke"


def retry_after(response: requests.Response) -> float:
    """Seconds that a server wants to be left alone, at most a minute; 0 if it says nothing."""
    text = response.headers.get("Retry-After", "")
    return min(2 * _LONGEST_WAIT, float(text)) if text.isascii() and text.isdigit() else 0.0
