"""The command line as a client of the instance's own REST API."""

from __future__ import annotations

from typing import Any

import httpx

from emberbox.cli.errors import CliError
from emberbox.cli.exports import client_variables
from emberbox.settings import Settings

DEADLINE_SECONDS = 30.0


class Api:
    """Calls with the first team's key. Close it, or use it as a context manager."""

    def __init__(self, settings: Settings) -> None:
        variables = client_variables(settings)
        self.sandbox_url = variables["E2B_SANDBOX_URL"]
        self._url = variables["E2B_API_URL"]
        self._http = httpx.Client(
            base_url=self._url,
            headers={"X-API-KEY": variables["E2B_API_KEY"]},
            timeout=DEADLINE_SECONDS,
            trust_env=False,
        )

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(self, method: str, path: str, **arguments: Any) -> Any:
        """The decoded answer, None for an empty one.

        Raises:
            CliError: the API does not answer, or answers with an error, whose message it carries.
        """
        response = self._send(method, path, **arguments)
        return response.json() if response.content else None

    def pages(self, path: str, **params: Any) -> list[Any]:
        """All pages of a list."""
        items: list[Any] = []
        token: str | None = None
        while True:
            response = self._send("GET", path, params={**params, **({"nextToken": token} if token else {})})
            items += response.json()
            token = response.headers.get("x-next-token")
            if not token:
                return items

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise CliError(
                f"the API at {self._url} does not answer ({error}): is Emberbox running? See `emberbox status`"
            ) from None
        if response.is_error:
            raise CliError(_message(response))
        return response


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return f"the API answered {response.status_code}: {response.text[:200]}"
