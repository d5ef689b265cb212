"""How long a caller is ready to wait, as the request says it."""

from __future__ import annotations

from serve.errors import InvalidInput

HEADER = b"x-request-timeout-ms"
_PLACE = "header x-request-timeout-ms"
_LONGEST_MS = 86_400_000.0


def timeout_s(headers: dict[bytes, bytes]) -> float | None:
    """Return the request's deadline in seconds from now, or None where it names none.

    Raises:
        InvalidInput: The header is not a positive number of milliseconds of at most a day.
    """
    raw = headers.get(HEADER)
    if raw is None:
        return None
    text = raw.decode("latin-1").strip()
    digits = text.replace(".", "", 1)
    if not (text.isascii() and digits.isdigit() and len(text) <= 20 and 0 < float(text) <= _LONGEST_MS):
        raise InvalidInput(
            f"{text[:40]!r} is not a number of milliseconds above 0 and at most {_LONGEST_MS:.0f}", place=_PLACE
        )
    return float(text) / 1000
