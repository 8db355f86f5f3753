"""Messages -> a reply of an OpenAI-compatible chat endpoint, with a deadline, retries and a budget.

Only the standard library's client is used. Redirects are not followed: the key goes to the host
that the setting names, and to no other.
"""

import contextlib
import http.client
import json
import random
import socket
import threading
import time
import urllib.parse
from typing import Any, NamedTuple

from dpojax.errors import ConfigError
from dpojax.untrusted.plain_data import parse_json

FIRST_PAUSE_S = 0.5  # before the second try of a call; each later pause is twice as long
LONGEST_PAUSE_S = 60.0  # also where the server asks for more
MAX_REPLY_BYTES = 2**20
# What no second try mends: a wrong address, key or model.
FINAL_STATUS = (400, 401, 403, 404, 405, 422)


class EndpointSettings(NamedTuple):
    """How an endpoint is called."""

    url: str  # without /chat/completions
    model: str
    key: str  # "": none is sent
    timeout_s: float  # of one call, from its start to its last byte
    retries: int
    max_calls: int  # 0: any number
    calls_per_minute: int  # 0: any number


class NoReplyError(Exception):
    """A call got no reply, after all of its tries; the message is a predicate."""


class _RetryError(Exception):
    """A try failed in a way that another one may mend."""

    def __init__(self, reason: str, pause_s: float = 0.0):
        super().__init__(reason)
        self.pause_s = pause_s  # that the server asks for


class ChatEndpoint:
    """An endpoint; may be called by several threads."""

    def __init__(self, settings: EndpointSettings, *, calls: int = 0):
        """Reads the address.

        Args:
          calls: that were made before, and count against the budget.
        Raises: ConfigError for what is no address of http or https.
        """
        self.settings = settings
        self.calls = calls
        parts = urllib.parse.urlsplit(settings.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ConfigError(
                f"reward.terms: judge:{settings.url} must be an address like"
                " judge:https://HOST/v1; the key stands in an environment variable"
                " (reward.judge_key)"
            )
        self.scheme = parts.scheme
        self.host = parts.hostname
        self.port = parts.port
        self.path = f"{parts.path.rstrip('/')}/chat/completions"
        self._lock = threading.Lock()
        self._next_call = 0.0  # of time.monotonic()

    def reply(self, text: str) -> str:
        """What the model answers to one user's message, at temperature 0.

        Raises: NoReplyError where every try failed; ConfigError for a budget that is spent, or what
          no other try would mend.
        """
        message = {"role": "user", "content": text}
        body = {"model": self.settings.model, "temperature": 0, "messages": [message]}
        data = json.dumps(body).encode()
        reason = ""
        for attempt in range(self.settings.retries + 1):
            self._take_turn()
            try:
                return self._ask(data)
            except _RetryError as error:
                reason = str(error)
                pause = FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0)
                pause = min(LONGEST_PAUSE_S, max(pause, error.pause_s))
            if attempt < self.settings.retries:
                time.sleep(pause)
        raise NoReplyError(f"{reason} ({self.settings.retries + 1} tries)")

    def _take_turn(self) -> None:
        """Counts a call, and waits until the rate allows it. Raises ConfigError over the budget."""
        s = self.settings
        with self._lock:
            if s.max_calls and self.calls >= s.max_calls:
                raise ConfigError(
                    f"reward.judge_max_calls is {s.max_calls}, and as many calls are made; raise it"
                    " and start again: replies so far are kept in the workdir"
                )
            self.calls += 1
            now = time.monotonic()
            turn = max(now, self._next_call)
            if s.calls_per_minute:
                self._next_call = turn + 60 / s.calls_per_minute
        if turn > now:
            time.sleep(turn - now)

    def _ask(self, data: bytes) -> str:
        """One try."""
        kind = http.client.HTTPConnection
        if self.scheme == "https":
            kind = http.client.HTTPSConnection
        s = self.settings
        connection = kind(self.host, self.port, timeout=s.timeout_s)
        headers = {"Content-Type": "application/json"}
        if s.key:
            headers["Authorization"] = f"Bearer {s.key}"
        watch = None
        began = time.monotonic()
        try:
            connection.connect()
            # A server that sends a byte now and then never meets a socket's own time-out. The
            # connection forgets its socket before the reply is read.
            watch = threading.Timer(s.timeout_s, _shut, [connection.sock])
            watch.daemon = True
            watch.start()
            connection.request("POST", self.path, data, headers)
            response = connection.getresponse()
            body = response.read(MAX_REPLY_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise _RetryError(f"fails: {type(error).__name__}: {error}") from error
        finally:
            if watch is not None:
                watch.cancel()
            connection.close()
        if time.monotonic() - began >= s.timeout_s:
            raise _RetryError(f"takes more than {s.timeout_s:g} s")
        return self._content(response, body)

    def _content(self, response: http.client.HTTPResponse, body: bytes) -> str:
        """The reply's text."""
        start = body[:200].decode("utf-8", errors="replace")
        if response.status in FINAL_STATUS or 300 <= response.status < 400:
            raise ConfigError(
                f"reward.terms: judge:{self.settings.url} answers with status {response.status}:"
                f" {start!r}; look at the address, reward.judge_model and the key in the"
                " environment variable that reward.judge_key names"
            )
        if response.status != 200:
            raise _RetryError(
                f"answers with status {response.status}",
                _seconds(response.getheader("Retry-After")),
            )
        if len(body) > MAX_REPLY_BYTES:
            raise _RetryError(f"sends more than {MAX_REPLY_BYTES:,} bytes")
        try:
            content = parse_json(body, max_bytes=MAX_REPLY_BYTES)["choices"][0]["message"][
                "content"
            ]
        except (ValueError, LookupError, TypeError) as error:
            raise _RetryError(f"sends no reply, but {start!r:.80}") from error
        if not isinstance(content, str):
            raise _RetryError(f"sends no reply, but {content!r:.80}")
        return content


def _shut(waited_for: socket.socket) -> None:
    """Ends a connection that another thread reads from."""
    with contextlib.suppress(OSError):
        waited_for.shutdown(socket.SHUT_RDWR)


def _seconds(header: Any) -> float:
    """What a Retry-After header asks for; 0 where it is a date, or no number."""
    try:
        return max(0.0, float(header))
    except (TypeError, ValueError):
        return 0.0
