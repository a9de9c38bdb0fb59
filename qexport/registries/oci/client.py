"""Requests to an OCI registry.

oras gives the session without cookies, the exchange of a password for a token, the question whether a blob is there,
and where an upload goes on. It has no timeouts, retries a wrong password for minutes and a broken upload from the wrong
place, does not answer challenges for basic authentication, keeps tokens that have run out, does not read DOCKER_CONFIG,
compares no digests, and holds whole blobs in memory. That is what this file, `uploads` and `downloads` do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import requests
from oras.auth.utils import get_basic_auth, parse_auth_header
from oras.container import Container
from oras.provider import Registry

from qexport.errors import InputError
from qexport.registries.authorities import OF_REGISTRIES, named_authorities
from qexport.registries.destinations import OciDestination, is_loopback
from qexport.registries.oci.credentials import Credentials, config_path, find_credentials
from qexport.registries.oci.transport import (
    Loopback,
    WithTimeout,
    backoff,
    is_about_certificate,
    nothing_added,
    reason_of,
    retry_after,
)

_API_HOSTS: Final = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}
_ATTEMPTS: Final = 6
_TRANSIENT: Final = frozenset({408, 429, 500, 502, 503, 504})
_ANSWERS: Final = frozenset({404, 405, 413, 416})
"""Statuses above 400 that say something about what was asked for, for callers to read."""

_LONGEST_MESSAGE: Final = 300


class BrokenRequest(Exception):
    """A request that may or may not have reached the registry, whose sender must ask what has become of it.

    Args:
        reason: a few words, without addresses.
        status: of HTTP; None if there was no answer.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.status = reason, status


class Client(Registry):  # type: ignore[misc] # oras has no types
    """One repository of a registry.

    Args:
        destination: the repository.
        sleep: waits between attempts.

    Raises:
        InputError: the registry cannot be reached, or its certificate is not trusted.
        RecipeError: the environment names authorities that cannot be used.
    """

    def __init__(self, destination: OciDestination, sleep: Callable[[float], None] = time.sleep) -> None:
        host = _API_HOSTS.get(destination.host, destination.host)
        super().__init__(hostname=host, tls_verify=named_authorities(OF_REGISTRIES) or True)
        self.destination, self.sleep = destination, sleep
        self.container = Container("name", registry=host)
        self.container.namespace, self.container.repository = None, destination.name
        self._authorization: str | None = None
        self.session.auth = nothing_added
        self.session.mount("https://", WithTimeout())
        self.session.mount("http://", Loopback())
        self.prefix = self._scheme(host)

    def url(self, path: str) -> str:
        """The address of something in the repository, for example `blobs/sha256:...`."""
        return f"{self.prefix}://{self.container.registry}/v2/{self.destination.name}/{path}"

    def location(self, response: requests.Response) -> str:
        """Where an upload goes on, as an absolute address.

        Raises:
            InputError: the registry names none, or one that is malformed.
        """
        found = str(self._get_location(response, self.container))
        if not found:
            raise self.failure("the registry does not say where an upload goes on")
        try:
            _ = urlsplit(found).port
        except ValueError:
            raise self.failure("the registry says that an upload goes on at a malformed address") from None
        return found

    def do_request(  # oras calls it by this name
        self,
        url: str,
        method: str = "GET",
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        json: object = None,
        stream: bool = False,
        *,
        attempts: int = _ATTEMPTS,
    ) -> requests.Response:
        """Asks, with authentication where the registry wants it, again after a while where it or the network fails.

        Args:
            url: absolute.
            method: of HTTP.
            data: the body.
            headers: further ones.
            json: not used.
            stream: whether the caller reads the body.
            attempts: how many times; with one, what fails is a `BrokenRequest`.

        Returns:
            A response below 400, or one of `_ANSWERS`.

        Raises:
            InputError: the registry refuses, or fails at every attempt.
            BrokenRequest: with a single attempt, the connection or the registry failed.
        """
        for attempt in range(1, attempts + 1):
            wait = 0.0
            try:
                response = self._authenticated(url, method, data, dict(headers or {}), stream)
            except ValueError as error:  # of requests, urllib3 and urllib.parse, before anything is sent
                raise self.failure("the registry sends to an address that is malformed") from error
            except requests.RequestException as error:
                reason = reason_of(error)
            else:
                if response.status_code not in _TRANSIENT:
                    return self._accepted(response)
                reason, wait = f"HTTP status {response.status_code}", retry_after(response)
                response.close()
            if attempts == 1:
                raise BrokenRequest(reason)
            if attempt < attempts:
                self.sleep(wait or backoff(attempt))
        raise self.failure(f"the registry failed {attempts} times: {reason}", "try again later")

    def failure(self, what: str, mend: str | None = None) -> InputError:
        """An error about this repository."""
        return InputError(what, where=str(self.destination), mend=mend)

    def _scheme(self, host: str) -> str:
        """TLS, but for a registry on this machine that speaks none."""
        try:
            self.session.get(f"https://{host}/v2/", verify=self._tls_verify).close()
        except requests.exceptions.SSLError as error:
            if not is_loopback(host) or is_about_certificate(error):
                raise self._untrusted(error) from error
            return "http"
        except requests.RequestException as error:
            if not is_loopback(host):
                raise self.failure(f"the registry cannot be reached: {reason_of(error)}") from error
            return "http"
        return "https"

    def _untrusted(self, error: requests.exceptions.SSLError) -> InputError:
        if not is_about_certificate(error):
            return self.failure("the registry speaks no TLS, which is wanted everywhere but on this machine")
        mend = "name the file of the authority that signed it in SSL_CERT_FILE"
        return self.failure("the registry's certificate is not trusted", mend)

    def _authenticated(
        self, url: str, method: str, data: bytes | None, headers: dict[str, str], stream: bool
    ) -> requests.Response:
        response = self._send(url, method, data, headers, stream)
        if response.status_code != 401 or not self._is_own(url):
            return response
        challenge = response.headers.get("Www-Authenticate", "")
        response.close()
        self._authorization = self._answer(challenge)
        response = self._send(url, method, data, headers, stream)
        if response.status_code == 401:
            raise self.failure("the registry refuses the name or the password", f"see {config_path()}")
        return response

    def _send(
        self, url: str, method: str, data: bytes | None, headers: dict[str, str], stream: bool
    ) -> requests.Response:
        if self._authorization and self._is_own(url):
            headers = {**headers, "Authorization": self._authorization}
        response: requests.Response = self.session.request(
            method, url, data=data, headers=headers, stream=stream, verify=self._tls_verify
        )
        return response

    def _is_own(self, url: str) -> bool:
        parts = urlsplit(url)
        return (parts.scheme, parts.netloc) == (self.prefix, self.container.registry)

    def _answer(self, challenge: str) -> str:
        """The header that a challenge wants."""
        found = find_credentials(self.destination.host)
        if challenge.lower().startswith("basic"):
            if found is None:
                raise self.failure("the registry wants a name and a password", self._how_to_log_in())
            return f"Basic {get_basic_auth(found.name, found.password)}"
        wanted = parse_auth_header(challenge)
        if not challenge.lower().startswith("bearer") or not wanted.realm:
            raise self.failure("the registry wants a kind of authentication that is not known")
        token = self._token(wanted, found)
        if not isinstance(token, str) or not token.isprintable():
            what = "the registry's token service refuses" + (" the name or the password" if found else "")
            raise self.failure(what, None if found else self._how_to_log_in())
        return f"Bearer {token}"

    def _token(self, wanted: Any, found: Credentials | None) -> object:
        try:
            if found is None:
                return self.auth.request_anonymous_token(wanted)
            self.auth.set_basic_auth(found.name, found.password)
            return self.auth.request_token(wanted)
        except (ValueError, AttributeError) as error:
            if isinstance(error, requests.ConnectionError):
                raise
            raise self.failure("the registry's token service answers with something else") from error

    def _how_to_log_in(self) -> str:
        return f"docker login {self.destination.host}; without a program for credentials, it writes {config_path()}"

    def _accepted(self, response: requests.Response) -> requests.Response:
        if response.status_code < 400 or response.status_code in _ANSWERS:
            return response
        told = _message(response)
        if response.status_code == 403:
            raise self.failure(f"the registry does not allow it{told}", "ask for the right to push or pull there")
        raise self.failure(f"the registry refuses: HTTP status {response.status_code}{told}")


def _message(response: requests.Response) -> str:
    """What a registry says of an error, shortened; nothing if it is not said in the form of OCI."""
    try:
        errors = response.json()["errors"]
        text = "; ".join(f"{each['code']} {each.get('message', '')}".strip() for each in errors[:3])
    except (ValueError, KeyError, TypeError, AttributeError, requests.RequestException):
        return ""
    return f": {''.join(filter(str.isprintable, text))[:_LONGEST_MESSAGE]}"
