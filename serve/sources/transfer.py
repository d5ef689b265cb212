"""HTTP as downloads need it: judged addresses and redirects, resumption, and a hash before anything counts."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urljoin, urlsplit

from serve.errors import SourceError
from serve.settings import Settings
from serve.sources.guard import Origin, Reach, connect
from serve.sources.store import Broken, Digest, Meter, need_room, persist, size_of

_BLOCK = 2**20
_MAX_REDIRECTS = 5
_SLOWEST_BYTES_PER_S = 1024
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_URL_SAFE = "/%:@!$&'()*+,;=~-._?"


def _trust() -> ssl.SSLContext:
    # Where the machine has no certificates of its own, as in a slim image, those of certifi stand in.
    paths = ssl.get_default_verify_paths()
    if paths.cafile or (paths.capath and any(Path(paths.capath).iterdir())):
        return ssl.create_default_context()
    import certifi

    return ssl.create_default_context(cafile=certifi.where())


class _Connection(http.client.HTTPConnection):
    """One connection to a checked address; its hostname is what the certificate must be for."""

    def __init__(self, origin: Origin, client: Client) -> None:
        super().__init__(origin.host, origin.port, timeout=client.settings.download_timeout_s)
        self._origin, self._client = origin, client
        self.aborted = False

    def connect(self) -> None:
        self.sock = connect(self._origin, self._client.reach, self._client.settings.download_timeout_s)
        if self._origin.scheme == "https":
            wrapped = self._client.context.wrap_socket(
                self.sock, server_hostname=self._origin.host, do_handshake_on_connect=False
            )
            self.sock = wrapped
            wrapped.do_handshake()

    def abort(self) -> None:
        """End what another thread is waiting for."""
        self.aborted = True
        if self.sock is not None:
            try:
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
            except OSError:
                return


class Client:
    """Answers to GET, over TLS with verified certificates, from hosts within reach.

    Args:
        reach: What may be reached, and redirected to.
        secrets: Headers sent to the one origin they belong to, and to no other.
    """

    def __init__(
        self, settings: Settings, reach: Reach, *, secrets: tuple[Origin, Mapping[str, str]] | None = None
    ) -> None:
        self.settings = settings
        self.reach = reach
        self.context = _trust()
        self._secrets = secrets

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        """Give the answer after redirects, its body unread.

        Raises:
            Broken: The connection failed, or the server says that it might work later.
            SourceError: It refused, is not trusted, or led somewhere that is not within reach.
        """
        start = Origin.of(url)
        for _ in range(_MAX_REDIRECTS + 1):
            origin = Origin.of(url)
            self.reach.check_redirect(start, origin)
            connection = _Connection(origin, self)
            try:
                answer = self._ask(connection, origin, url, headers)
                if answer.status not in (301, 302, 303, 307, 308):
                    _check_status(answer, origin)
                    yield answer
                    return
                url = urljoin(url, answer.headers.get("Location", ""))
            finally:
                connection.close()
        raise SourceError(f"{start} redirects more than {_MAX_REDIRECTS} times")

    def _ask(
        self, connection: _Connection, origin: Origin, url: str, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_URL_SAFE)
        sent = {"Host": origin.netloc, "User-Agent": "roundhouse", **headers}
        if self._secrets and self._secrets[0] == origin:
            sent |= self._secrets[1]
        # A socket's timeout is for each byte; the whole answer's head gets no longer either.
        watch = threading.Timer(self.settings.download_timeout_s, connection.abort)
        watch.daemon = True
        watch.start()
        try:
            connection.request("GET", target, headers=sent)
            answer = connection.getresponse()
        except ssl.SSLCertVerificationError as error:
            raise SourceError(
                f"the certificate of {origin.netloc} is not trusted, {error.verify_message}; "
                "set SSL_CERT_FILE to the authority that signed it"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise Broken(f"{origin.netloc}: {error or type(error).__name__}") from error
        finally:
            watch.cancel()
        if connection.aborted:
            raise Broken(f"{origin.netloc} took more than {self.settings.download_timeout_s:g} s to begin its answer")
        return answer


def _check_status(answer: http.client.HTTPResponse, origin: Origin) -> None:
    status = answer.status
    if status in (200, 206, 416):
        return
    said = f"{origin.netloc} answered {status} {answer.reason}"
    if status in _RETRIED:
        after = answer.headers.get("Retry-After", "")
        raise Broken(said, retry_after_s=float(after) if re.fullmatch(r"[0-9]{1,6}", after) else None)
    fix = {401: "; it wants a login", 403: "; access is denied", 404: "; is the path right?"}.get(status, "")
    raise SourceError(said + fix)


def download(
    client: Client,
    url: str,
    to: Path,
    *,
    digest: Digest,
    size: int | None,
    limit: int,
    meter: Meter,
    sole: bool = False,
) -> None:
    """Fill a file, going on from what is in it, and return when its hash is right.

    Args:
        digest: What the file must hash to.
        size: Its bytes, where something told.
        limit: Bytes beyond which an answer is cut off.
        sole: It is the only file of its fetch, so that the meter gets its size when the server tells it.

    Raises:
        SourceError: It could not be had, or is not what it must be; a file with the wrong hash is removed.
    """
    meter.add(size_of(to))
    # What was begun by another process, or ended without a known length, gets a second chance when its hash is wrong.
    final = size_of(to) == 0

    def attempt() -> None:
        nonlocal final
        if size is None or size_of(to) != size:
            final &= _continue(client, url, to, size=size, limit=limit, meter=meter, sole=sole)

    for second in (False, True):
        persist(attempt, reached=lambda: size_of(to), meter=meter, settings=client.settings)
        to.touch()
        found = digest.of(to)
        if found == digest.hexdigest:
            return
        meter.add(-size_of(to))
        to.unlink()
        if final or second:
            raise SourceError(f"{Origin.of(url).netloc} sent what has {digest.kind} {found} and not {digest.hexdigest}")


def _continue(client: Client, url: str, to: Path, *, size: int | None, limit: int, meter: Meter, sole: bool) -> bool:
    """Ask for what is missing and write it; return whether the server told the length."""
    have = size_of(to)
    headers = {"Range": f"bytes={have}-"} if have else {}
    with client.get(url, headers) as answer:
        start, total = _place_of(answer, have)
        if start is None:
            meter.add(-have)
            to.unlink(missing_ok=True)
            raise Broken("the server cannot go on from there")
        if total is not None and total == have and answer.status == 416:
            return True
        if total is not None and size is not None and total != size:
            raise Broken(f"the server has {total} bytes where {size} were listed")
        if total is not None and total > limit:
            raise SourceError(f"is {total} bytes, above the {limit} of ROUNDHOUSE_MAX_UNPACKED_BYTES")
        if sole and total is not None:
            meter.expect(total)
            need_room(to.parent, total - (start or 0))
        if start == 0 and have:
            meter.add(-have)
        with to.open("r+b" if start else "wb") as file:
            file.seek(start)
            _copy(answer, file, meter, settings=client.settings, limit=limit - start)
    if total is not None and size_of(to) != total:
        raise Broken(f"the connection ended after {size_of(to)} of {total} bytes")
    return total is not None


def _place_of(answer: http.client.HTTPResponse, have: int) -> tuple[int | None, int | None]:
    """Return (first byte of the body, bytes of the whole file where known); (None, None) where the two do not fit."""
    ranged = re.fullmatch(r"bytes (?:([0-9]+)-[0-9]+|\*)/([0-9]+|\*)", answer.headers.get("Content-Range", "").strip())
    total = int(ranged[2]) if ranged and ranged[2] != "*" else None
    if answer.status == 200:
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
    if answer.status == 206 and ranged and ranged[1] is not None and int(ranged[1]) == have:
        return have, total
    if answer.status == 416 and total == have:
        return have, total
    return None, None


def _copy(answer: http.client.HTTPResponse, file: BinaryIO, meter: Meter, *, settings: Settings, limit: int) -> None:
    window_s = settings.download_timeout_s
    since, in_window, got = time.monotonic(), 0, 0
    while True:
        try:
            block = answer.read1(_BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise Broken(f"the connection broke: {error or type(error).__name__}") from error
        if not block:
            return
        got += len(block)
        in_window += len(block)
        if got > limit:
            raise SourceError("is longer than ROUNDHOUSE_MAX_UNPACKED_BYTES; nothing more was read")
        file.write(block)
        meter.add(len(block))
        now = time.monotonic()
        if now - since >= window_s:
            if in_window < _SLOWEST_BYTES_PER_S * window_s:
                raise Broken(f"{in_window} bytes in {now - since:.0f} s are too few to go on with")
            since, in_window = now, 0
