"""One vLLM server over HTTP: calls on kept-alive connections, one attempt each, and errors in the server's own words.

    Server("http://127.0.0.1:8000", timeout=60).models()
"""

import re
from http.client import HTTPException

import requests
from urllib3.exceptions import HTTPError

IN_FLIGHT = 256                                     # requests at a time: vLLM's own limit of a batch
AGAIN = (408, 425, 429, 500, 502, 503, 504)         # what may go away by itself


class ServerError(RuntimeError):
    """The policy server refused a call (again=False), or failed in a way that may pass (again=True), in its own words."""

    def __init__(self, message: str, again: bool, status: int = 0, after: float = 0.0, timed_out: bool = False) -> None:
        super().__init__(message)
        self.again, self.status, self.after, self.timed_out = again, status, after, timed_out


class Server:
    """One vLLM server: calls over kept-alive connections, one attempt each. All errors are ServerError."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=IN_FLIGHT))

    def call(self, path: str, body: dict | None = None, timeout: float | None = None) -> requests.Response:
        """GET, or POST if there is a body; return the answer if its status is 200. timeout: seconds to the first byte."""
        seconds = timeout or self.timeout
        try:
            answer = self._session.request("GET" if body is None else "POST", self.url + path, json=body,
                                           timeout=(min(10.0, seconds), seconds), allow_redirects=False)
        except requests.RequestException as error:
            slow = isinstance(error, requests.ReadTimeout)
            why = f"no answer within {seconds:g} s" if slow else f"{type(error).__name__}: {reason(error)}"
            raise ServerError(f"{self.url}{path}: {why}", again=True, timed_out=slow) from error
        if answer.status_code != 200:
            after = answer.headers.get("Retry-After", "")
            raise ServerError(f"{self.url}{path}: HTTP {answer.status_code}: {words(answer)}",
                              again=answer.status_code in AGAIN, status=answer.status_code,
                              after=float(after) if re.fullmatch(r"\d{1,6}(\.\d+)?", after, re.ASCII) else 0.0)
        return answer

    def json(self, path: str, body: dict | None = None, timeout: float | None = None) -> dict:
        answer = self.call(path, body, timeout)
        try:
            value = answer.json()
        except ValueError as error:
            raise ServerError(f"{self.url}{path}: the answer is not JSON: {answer.text[:200]!r}", again=True) from error
        if not isinstance(value, dict):
            raise ServerError(f"{self.url}{path}: the answer is no JSON object: {answer.text[:200]!r}", again=False)
        return value

    def models(self) -> list[dict]:
        """What is served: base models (parent null) and adapters."""
        data = self.json("/v1/models", timeout=30).get("data")
        if not isinstance(data, list) or not all(isinstance(model, dict) and "id" in model for model in data):
            raise ServerError(f"{self.url}/v1/models: no list of models in the answer: is this vLLM?", again=False)
        return data

    def healthy(self) -> bool:
        try:
            self.call("/health", timeout=5)
        except ServerError:
            return False
        return True

    def close(self) -> None:
        self._session.close()


def words(answer: requests.Response) -> str:
    """The server's own message, without the JSON around it."""
    try:
        value = answer.json()
        value = value.get("error", value)
        return str(value.get("message", value))[:600]
    except (ValueError, AttributeError):
        return answer.text[:300]


def reason(error: Exception) -> str:
    """The innermost part of what requests wraps three times: 'Connection refused' and the like."""
    while isinstance(inner := error.__cause__ or error.__context__, OSError | HTTPException | HTTPError):
        error = inner
    return str(error) or type(error).__name__
