"""Which hosts a download may reach: the address judged is the one connected to, whatever DNS says next."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from serve.errors import SourceError

#: Addresses that clouds answer instance metadata on although they count as public.
_METADATA = frozenset({ipaddress.ip_address("168.63.129.16")})
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
#: Not public, whichever release of Python is asked.
_LOCAL = (
    ipaddress.ip_network("192.0.0.0/24"),
    ipaddress.ip_network("64:ff9b:1::/48"),
    ipaddress.ip_network("fec0::/10"),
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host (small letters, no brackets) and port of a URL."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """Take it from a URL. Raises `SourceError` where that is none of http or https."""
        try:
            parts = urlsplit(url)
            port = parts.port or (80 if parts.scheme == "http" else 443)
        except ValueError as error:
            raise SourceError(f"{url!r} is not a URL") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise SourceError(f"{url!r} is not an http or https URL without a user in it")
        return cls(parts.scheme, parts.hostname.rstrip("."), port)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}"

    @property
    def netloc(self) -> str:
        """`host` or `host:port`, as a `Host` header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (80 if self.scheme == "http" else 443) else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Reach:
    """What the operator lets downloads reach beyond public addresses of the source's own host.

    Args:
        allowed: `host` or `host:port`, which may be private, be redirected to, and speak plain http.
        redirects: Suffixes such as `.example.org` of hosts that may be redirected to; they must be public and https.
    """

    allowed: tuple[str, ...] = ()
    redirects: tuple[str, ...] = ()

    def names(self, origin: Origin) -> bool:
        """Tell whether the operator named this host."""
        listed = {entry.lower().rstrip(".") for entry in self.allowed}
        bracketed = f"[{origin.host}]" if ":" in origin.host else origin.host
        return not listed.isdisjoint({origin.host, bracketed, f"{bracketed}:{origin.port}"})

    def check_redirect(self, start: Origin, target: Origin) -> None:
        """Raise `SourceError` unless a download that began at `start` may go on at `target`."""
        if target == start or self.names(target):
            return
        if target.scheme == "https" and target.host.endswith(self.redirects):
            return
        what = "plain http at" if target.scheme == "http" else "another host,"
        raise SourceError(
            f"{start} redirects to {what} {target.netloc}; if that is right, name it in ROUNDHOUSE_ALLOWED_HOSTS"
        )


def forbidden(address: str) -> str | None:
    """Return why an IP address is none that a download may reach, or None for a public one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # In both forms the address reached is the one inside.
        ip = ip.ipv4_mapped or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _TRANSLATED else ip)
    for one in (ip, *_embedded(ip)):
        if one.is_loopback:
            return "this machine itself"
        if one.is_link_local:
            return "a link-local address, where clouds keep their metadata service"
        if one in _METADATA:
            return "a cloud's metadata service"
        if not one.is_global or one.is_multicast or one.is_reserved or any(one in net for net in _LOCAL):
            return "not a public address"
    return None


def _embedded(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    return [one for one in (ip.sixtofour, *(ip.teredo or ())) if one is not None]


def connect(origin: Origin, reach: Reach, timeout_s: float) -> socket.socket:
    """Open a TCP connection to one of the addresses that the host had when they were judged.

    Raises:
        SourceError: One of them is not public, and the operator did not name the host; or the name cannot be one.
        OSError: The name does not resolve, or no address answers.
    """
    try:
        found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise SourceError(f"{origin.host} is not the name of a host: {error}") from error
    if not reach.names(origin):
        for *_, place in found:
            if reason := forbidden(str(place[0])):
                raise SourceError(
                    f"{origin.host} is {place[0]}, {reason}; if that is right, name it in ROUNDHOUSE_ALLOWED_HOSTS"
                )
    last: OSError | None = None
    for family, kind, protocol, _, place in found:
        opened = socket.socket(family, kind, protocol)
        try:
            opened.settimeout(timeout_s)
            opened.connect(place)
        except OSError as error:
            opened.close()
            last = error
        else:
            return opened
    raise last or OSError(f"{origin.host} has no address")
