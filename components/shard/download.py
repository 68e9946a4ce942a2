"""Pictures from the web, where a list of URLs is untrusted input and the servers are strangers.

| what happens | result |
|---|---|
| 200 and a body within `max_bytes` | the bytes |
| no http or https URL, or none at all | `url` |
| a loopback, private, link-local, multicast or reserved address, of the URL or of any redirect | `private-address` |
| more than `redirects` redirects; one to another scheme | `redirects`; `url` |
| 404 and every other status that will not pass | `http-404` ... |
| 408, 425, 429, 5xx | tried again, then `http-503` ... |
| no address, no connection, no answer in time, cut off | tried again, then `dns`, `connect`, `timeout`, `cut-off` |
| a certificate that is not valid | `tls` |
| HTML | `html`, its body unread |
| more than `max_bytes`, announced or not | `too-many-bytes`, the connection closed |
| no HTTP at all | `no-http` |

Pauses double from half a second; a server's Retry-After is kept for its whole host, and one that asks for more than
`longest_pause` ends the tries. Addresses are judged where the socket is made, which is the one place that every
connection passes: what was checked is what is connected to, whatever a name resolves to the next time. No proxy of
the environment is used, since it would connect in our place.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import aiohttp
from yarl import URL

from components.shard.source_settings import DownloadSettings

FIRST_PAUSE = 0.5
NO_ANSWER = ("dns", "connect", "timeout")  # reasons that may lie with this machine's own network
_PASSING = (408, 425, 429)
_LARGE = 2**20  # bytes from which on a body is one of the large ones
_LARGE_AT_ONCE = 4
_LONGEST_URL = 4096
_LOOKUPS_AT_ONCE = 32
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
"""Gateways to IPv4: which address lies behind, only whoever runs them knows."""


class Fetched(NamedTuple):
    """The bytes; or None with a short reason to count by and a text for people."""

    data: bytes | None
    reason: str = ""
    detail: str = ""


class ForbiddenAddress(OSError):
    """An address that nothing is fetched from."""


class _Again(Exception):
    """A try that failed for a reason that may pass; `asked`: seconds that the server asks for."""

    def __init__(self, reason: str, detail: str = "", asked: float | None = None) -> None:
        super().__init__(reason)
        self.failed, self.asked = Fetched(None, reason, detail), asked


@dataclass
class _Host:
    slots: asyncio.Semaphore
    closed_until: float = 0.0

    async def opens(self) -> None:
        while (wait := self.closed_until - time.monotonic()) > 0:
            await asyncio.sleep(wait)


class Downloader:
    """One client of one process; use it as `async with`, within one event loop.

    Memory: `at_once` bodies of 1 MiB and four of `max_bytes` at most. Waiting to be one of the four
    does not count as time of a try.
    """

    def __init__(self, settings: DownloadSettings, *, max_bytes: int, allow_private: bool = False) -> None:
        self._settings, self._max_bytes, self._allow_private = settings, max_bytes, allow_private
        self._slots = asyncio.Semaphore(settings.at_once)
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        self._hosts: dict[str, _Host] = defaultdict(lambda: _Host(asyncio.Semaphore(settings.per_host)))

    async def __aenter__(self) -> Downloader:
        self._lookups = ThreadPoolExecutor(_LOOKUPS_AT_ONCE)
        asyncio.get_running_loop().set_default_executor(self._lookups)
        connector = aiohttp.TCPConnector(
            limit=self._settings.at_once,
            limit_per_host=self._settings.per_host,
            resolver=aiohttp.ThreadedResolver(),
            socket_factory=self._socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={
                "User-Agent": self._settings.user_agent,
                "Accept": "image/*",
                "Accept-Encoding": "identity",
            },
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def fetch(self, url: str) -> Fetched:
        """What lies at `url`, or why not; never raises for what a server does."""
        target = _parse(url)
        if target is None:
            return Fetched(None, "url", "no http or https URL")
        host = self._hosts[target.host or ""]
        failed = Fetched(None)
        for number in range(self._settings.tries):
            try:
                async with host.slots:
                    await host.opens()
                    async with self._slots, asyncio.timeout(self._settings.timeout) as limit:
                        return await self._get(target, limit)
            except _Again as again:
                failed, asked = again.failed, again.asked
            except TimeoutError:
                failed, asked = Fetched(None, "timeout", f"no end within {self._settings.timeout:g} s"), None
            pause = FIRST_PAUSE * 2**number * random.uniform(0.5, 1) if asked is None else asked
            if number + 1 == self._settings.tries or (asked or 0) > self._settings.longest_pause:
                break
            if asked is not None:
                host.closed_until = max(host.closed_until, time.monotonic() + asked)
            await asyncio.sleep(min(pause, self._settings.longest_pause))
        return failed

    async def _get(self, url: URL, limit: asyncio.Timeout) -> Fetched:
        """One try. Raises _Again and TimeoutError."""
        follow = self._settings.redirects > 0
        try:
            # aiohttp counts the answer that it does not follow.
            async with self._session.get(
                url, allow_redirects=follow, max_redirects=self._settings.redirects + 1
            ) as answer:
                return await self._body(answer, limit)
        except aiohttp.TooManyRedirects:
            return Fetched(None, "redirects", f"more than {self._settings.redirects} redirects")
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            return Fetched(None, "url", f"leads to {error}")
        except aiohttp.ClientConnectorDNSError as error:
            raise _Again("dns", str(error.os_error)) from None
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError) as error:
            return Fetched(None, "tls", str(error))
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, ForbiddenAddress):
                return Fetched(None, "private-address", str(error.os_error))
            raise _Again("connect", str(error.os_error)) from None
        except TimeoutError:
            raise
        except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, ConnectionError) as error:
            raise _Again("cut-off", str(error)) from None
        except (aiohttp.ClientError, ValueError) as error:
            return Fetched(None, "no-http", str(error))

    async def _body(self, answer: aiohttp.ClientResponse, limit: asyncio.Timeout) -> Fetched:
        status = answer.status
        if status in _PASSING or status >= 500:
            raise _Again(f"http-{status}", asked=_retry_after(answer.headers))
        if status != 200:
            return Fetched(None, f"http-{status}")
        if answer.content_type in ("text/html", "application/xhtml+xml"):
            return Fetched(None, "html", "the server sends a page")
        too_many = Fetched(None, "too-many-bytes", f"limit {self._max_bytes:,}")
        if (answer.content_length or 0) > self._max_bytes:
            return too_many
        data = bytearray()
        async for chunk in answer.content.iter_any():
            data += chunk
            if len(data) > min(_LARGE, self._max_bytes):
                break
        else:
            return Fetched(bytes(data))
        async with self._large_one(limit):
            while len(data) <= self._max_bytes:
                chunk = await answer.content.readany()
                if not chunk:
                    return Fetched(bytes(data))
                data += chunk
        return too_many

    @asynccontextmanager
    async def _large_one(self, limit: asyncio.Timeout) -> AsyncIterator[None]:
        """One of the permits for large bodies; the clock of the try stands still until it is there."""
        clock, ends = asyncio.get_running_loop().time, limit.when()
        assert ends is not None
        left = ends - clock()
        limit.reschedule(None)
        async with self._large:
            limit.reschedule(clock() + left)
            yield

    def _socket(self, info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        if not self._allow_private and not is_public(address[0]):
            raise ForbiddenAddress("an address that is not public")
        return socket.socket(family, kind, protocol)


def is_public(address: str) -> bool:
    """Whether an IP address, and every IPv4 address hidden in it, belongs to the open internet."""
    ip = ipaddress.ip_address(address)
    hidden: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        hidden = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip.is_site_local or any(ip in network for network in _NAT64):
            return False
    open_ = ip.is_global and not ip.is_multicast and not ip.is_reserved
    return open_ and all(is_public(str(one)) for one in hidden if one is not None)


def host_of(url: str) -> str | None:
    """The host that a URL names, None where it names none."""
    target = _parse(url)
    return None if target is None else target.host


def _parse(url: str) -> URL | None:
    try:
        target = URL(url) if len(url) <= _LONGEST_URL else URL()
        return target if target.scheme in ("http", "https") and target.host else None
    except (ValueError, UnicodeError):
        return None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of the header Retry-After: a number, or a date."""
    value = headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
