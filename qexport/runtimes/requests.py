"""JSON over HTTP with one server: bounded in time and bytes, without redirects, proxies or retries."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from qexport.errors import InputError, ResourceError

MOST_BYTES: Final = 1 << 28
"""Of one answer."""

_PIECE: Final = 1 << 16
_SHOWN: Final = 500


class Refused(Exception):
    """The server's answer is an error.

    Args:
        status: of HTTP.
        text: what it says, cut.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status


class HttpRequests:
    """Requests to one server; each has a connection of its own.

    Args:
        url: the server's address, perhaps with a path that precedes all paths.
        timeout: seconds that a whole answer may take.
    """

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname or "", parts.port
        self._prefix, self._timeout, self.url = parts.path.rstrip("/").removesuffix("/v1"), timeout, url

    def get(self, path: str) -> Any:
        """The JSON at a path.

        Raises:
            Refused: the status is not 200.
            InputError: nobody answers, or the answer is not JSON, or too long.
            ResourceError: it takes too long.
        """
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that a path answers to a JSON body. Raises as `get` does."""
        return self._ask("POST", path, json.dumps(body).encode())

    def _ask(self, method: str, path: str, body: bytes | None) -> Any:
        deadline = time.monotonic() + self._timeout
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        try:
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, self._prefix + path, body, headers)
            response = connection.getresponse()
            content = self._content(response, deadline)
        except TimeoutError as error:
            raise self._late() from error
        except (OSError, http.client.HTTPException) as error:
            raise InputError(
                f"the endpoint does not answer: {error}",
                where=self.url + path,
                mend="check the URL, and start the server",
            ) from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise Refused(response.status, content[:_SHOWN].decode("utf-8", "replace"))
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError("the endpoint's answer is not JSON", where=self.url + path) from error

    def _content(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        """Piece by piece: a server may send one byte a minute."""
        found = bytearray()
        while piece := response.read1(_PIECE):
            found += piece
            if len(found) > MOST_BYTES:
                raise InputError(f"the endpoint's answer is longer than {MOST_BYTES} bytes", where=self.url)
            if time.monotonic() > deadline:
                raise self._late()
        return bytes(found)

    def _late(self) -> ResourceError:
        mend = "give it more time: timeout"
        return ResourceError(f"the endpoint did not answer within {self._timeout:g} s", where=self.url, mend=mend)
