"""What the text of a source says, taken apart purely, so that it can be judged before anything is touched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from pydantic_core import PydanticCustomError

from serve.errors import SourceError
from serve.spec import check_source, source_scheme

_HOST = re.compile(r"([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Source:
    """A source, taken apart; `str(source)` is for people and leaves out an `https:` query, which may hold a secret.

    Args:
        scheme: `package`, `file`, `hf`, `s3`, `gs` or `https`.
        root: Import name, path, repository, bucket, or `host` or `host:port`.
        path: What is wanted below the root, without a slash around it (of `https:` the path after the host, with its
            slash); empty for all of it.
        query: Of `https:`, without its question mark.
    """

    scheme: str
    root: str
    path: str = ""
    query: str = ""

    def __str__(self) -> str:
        if self.scheme == "https":
            return f"https://{self.root}{self.path}"
        slashes = "//" if self.scheme in ("s3", "gs") else ""
        return f"{self.scheme}:{slashes}{self.root}{'/' if self.path else ''}{self.path}"


def parse_source(text: str) -> Source:
    """Take a source apart without looking at anything it names.

    Args:
        text: `package:NAME[/PATH]`, `file:PATH`, `hf:OWNER/NAME[/PATH]`, `s3://BUCKET[/PREFIX]`, `gs://BUCKET[/PREFIX]`
            or `https://HOST/FILE`.

    Raises:
        SourceError: It is none of these; the message says how it should read.
    """
    scheme = source_scheme(text)
    try:
        check_source(text)
    except PydanticCustomError as error:
        suggestion = (error.context or {}).get("suggestion")
        raise SourceError(f"{error.message()}{f'; did you mean {suggestion!r}?' if suggestion else ''}") from error
    rest = text[len(scheme) + 1 :]
    if scheme == "file":
        return Source(scheme, rest)
    if scheme == "https":
        return _parse_https(text)
    if scheme in ("s3", "gs"):
        return _parse_bucket(scheme, rest[2:])
    parts = rest.strip("/").split("/")
    named = 2 if scheme == "hf" else 1
    return Source(scheme, "/".join(parts[:named]), "/".join(parts[named:]))


def _parse_bucket(scheme: str, rest: str) -> Source:
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise SourceError(f"{scheme}://{rest}: {bucket!r} is not a bucket's name; give {scheme}://BUCKET/PREFIX")
    return Source(scheme, bucket, prefix.strip("/"))


def _parse_https(text: str) -> Source:
    url = urlsplit(text)
    shown = f"https://{url.netloc}{url.path}"
    if not _HOST.fullmatch(url.netloc):
        raise SourceError(f"{shown}: {url.netloc!r} is not a host; give https://HOST/FILE, without a user in it")
    port = url.netloc.rpartition(":")[2] if not url.netloc.endswith("]") and ":" in url.netloc else "443"
    if not 0 < int(port) < 65536:
        raise SourceError(f"{shown}: {port} is not a port; ports are 1 to 65535")
    if url.path.endswith("/"):
        raise SourceError(f"{shown}: names a folder; name one file or archive")
    if not text.isascii():
        raise SourceError(f"{shown}: has a character that is not ASCII; write it percent-encoded")
    return Source("https", url.netloc.lower(), url.path, url.query)
