"""A client of `pyllamabatch serve`, of the standard library: it costs the least where it shares the
cores with what it measures."""

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyllamabatch.compare.child import ArmError

HOST = "127.0.0.1"
Json = dict[str, Any]


class Client:
    """A connection, for one request after the other. Raises ArmError for an answer that is an error
    or ends early, and `limit_s` seconds after it was made."""

    def __init__(self, port: int, limit_s: float) -> None:
        self._limit_s = limit_s
        self._end = time.monotonic() + limit_s
        self._connection = http.client.HTTPConnection(HOST, port, timeout=limit_s)

    def whole(self, body: Json) -> Json:
        """The answer of `/completion`."""
        with self._asked(body) as answer:
            values: Json = json.loads(answer.read())
            return values

    def streamed(self, body: Json) -> Iterator[int]:
        """How many tokens have come so far, once for each token."""
        n = 0
        with self._asked({**body, "stream": True}) as answer:
            for line in answer:
                if not line.startswith(b"data: "):
                    continue
                values = json.loads(line[6:])
                if "error" in values:
                    raise ArmError(values["error"]["message"])
                # the last one says how many there are, those without a text of their own included
                yield from range(n + 1, values["tokens_predicted"] + 1)
                n = values["tokens_predicted"]
                if values["stop"]:
                    return
                if time.monotonic() > self._end:
                    raise TimeoutError
        raise ArmError("the answer ended early")

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _asked(self, body: Json) -> Iterator[http.client.HTTPResponse]:
        try:
            headers = {"Content-Type": "application/json"}
            self._connection.request("POST", "/completion", json.dumps(body).encode(), headers)
            answer = self._connection.getresponse()
            if answer.status != 200:
                raise ArmError(json.loads(answer.read())["error"]["message"])
            yield answer
        except TimeoutError:
            raise ArmError(f"not done after {self._limit_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise ArmError(f"{type(error).__name__}: {error}") from None
