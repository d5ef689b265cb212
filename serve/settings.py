"""The environment, read once into a frozen object, so that no other module depends on it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from serve.errors import SpecError

PREFIX = "ROUNDHOUSE_"


class Settings(BaseModel):
    """What an operator sets for a whole process; each field is `ROUNDHOUSE_<FIELD>` in the environment.

    Lists are comma-separated there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    cache_dir: Path = Field(
        default_factory=lambda: Path.home() / ".cache" / "roundhouse",
        description="Folder of downloaded and converted models; several processes may share it.",
    )
    state_dir: Path = Field(
        default_factory=lambda: Path.home() / ".local" / "state" / "roundhouse",
        description="Folder of what a running platform leaves for `status`, `predict` and `down`.",
    )
    host: str = Field(default="127.0.0.1", description="Address that HTTP is served on.")
    port: int = Field(default=8000, ge=1, le=65535, description="Port that HTTP is served on.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe line of the log."
    )
    log_format: Literal["auto", "json", "text"] = Field(
        default="auto", description="Form of the log: `auto` is text on a terminal and JSON elsewhere."
    )
    access_log: bool = Field(default=False, description="Log a line for each request.")
    offline: bool = Field(default=False, description="Never touch the network; use what is cached.")
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description="Hosts that downloads may reach although their address is private or only a redirect names them.",
    )
    max_unpacked_bytes: int = Field(
        default=200 * 1024**3,
        ge=1,
        description="Bytes that one archive may expand to.",
    )
    max_unpacked_ratio: float = Field(
        default=200.0, ge=1, description="How many times its own size an archive may expand to."
    )
    download_attempts: int = Field(
        default=6, ge=1, le=100, description="Tries of one download that in a row bring less than 1 MiB."
    )
    download_backoff_s: float = Field(
        default=0.5, ge=0, le=30, description="Wait before the second try, seconds; it doubles, to 30 at most."
    )
    download_timeout_s: float = Field(
        default=30.0, gt=0, le=3600, description="Seconds in which a download must connect, and bring 1 KiB for each."
    )
    hf_endpoint: str = Field(default="https://huggingface.co", description="The hub behind `hf:`.")
    proxies_url: str | None = Field(
        default=None,
        description="The gateway's way to the models where this machine's proxy is gone: a cluster's Service.",
    )
    metrics_dir: Path | None = Field(
        default=None,
        description="Folder where a node's processes keep their metrics; `up` makes one for each run.",
    )
    tracing_endpoint: str | None = Field(
        default=None,
        description="The OTLP collector that spans are sent to, http://host:port or https://; none records none.",
    )
    tracing_protocol: Literal["grpc", "http/protobuf"] = Field(
        default="grpc", description="How the collector is spoken to: gRPC is usual at port 4317, HTTP at 4318."
    )
    tracing_headers: tuple[str, ...] = Field(
        default=(), description="`name=value` of each header that the collector wants."
    )
    tracing_ratio: float = Field(
        default=0.01, ge=0, le=1, description="Share of the requests that are recorded where their caller does not say."
    )
    tracing_slow_ms: float | None = Field(
        default=None, gt=0, description="Requests that took longer are kept besides, ten a second and process at most."
    )
    tracing_errors: bool = Field(
        default=True, description="Requests that failed by our fault are kept besides, as many."
    )
    tracing_baggage: tuple[str, ...] = Field(
        default=(), description="Keys of the `baggage` header whose values spans may hold."
    )
    tracing_content: bool = Field(
        default=False, description="Spans may hold what clients sent, and what errors say of it."
    )
    s3_endpoint: str | None = Field(default=None, description="An S3-compatible server behind `s3:`.")

    @property
    def url(self) -> str:
        """Return where this machine reaches the platform."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"  # noqa: S104

    def replaced(self, **changed: object) -> Settings:
        """Return these settings with some in place of others.

        Raises:
            SpecError: One does not fit.
        """
        try:
            return Settings.model_validate(self.model_dump() | changed)
        except ValidationError as error:
            raise SpecError("\n".join(map(_line, error.errors(include_url=False)))) from error

    def as_environment(self) -> dict[str, str]:
        """Return the variables that `from_environment` reads these settings from, for other processes."""
        return {
            PREFIX + field.upper(): ",".join(value) if isinstance(value, tuple) else str(value)
            for field, value in self.model_dump().items()
            if value is not None
        }

    @classmethod
    def _is_list(cls, field: str) -> bool:
        return field in cls.model_fields and isinstance(cls.model_fields[field].default, tuple)

    @field_validator("tracing_endpoint")
    @classmethod
    def _is_url(cls, endpoint: str | None) -> str | None:
        if endpoint is not None:
            parts = urlsplit(endpoint)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("must be http://host:port or https://host:port")
        return endpoint

    @field_validator("tracing_headers")
    @classmethod
    def _are_pairs(cls, headers: tuple[str, ...]) -> tuple[str, ...]:
        for header in headers:
            if not header.partition("=")[0].strip() or "=" not in header:
                raise ValueError("must be name=value, more of them separated by commas")
        return headers

    @field_validator("host")
    @classmethod
    def _is_ipv4(cls, host: str) -> str:
        if ":" in host:
            raise ValueError("is an IPv6 address, which is not supported; give an IPv4 address or a name")
        return host

    @field_validator("cache_dir", "state_dir", "metrics_dir")
    @classmethod
    def _from_home(cls, folder: Path | None) -> Path | None:
        try:
            return folder.expanduser() if folder is not None else None
        except RuntimeError as error:
            raise ValueError("names the home of a user who has none") from error

    @staticmethod
    def wants_colour(environment: Mapping[str, str] | None = None) -> bool:
        """Return whether a terminal may be written to in colour: `NO_COLOR` is not set (no-color.org)."""
        return not (os.environ if environment is None else environment).get("NO_COLOR")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read `ROUNDHOUSE_*`.

        Raises:
            SpecError: A variable is unknown, empty or does not fit; every such variable has a line.
        """
        source = os.environ if environment is None else environment
        values: dict[str, object] = {}
        problems: list[str] = []
        for variable, text in source.items():
            if variable.startswith(PREFIX):
                field = variable[len(PREFIX) :].lower()
                if cls._is_list(field):
                    values[field] = tuple(part.strip() for part in text.split(",") if part.strip())
                elif text or field not in cls.model_fields:
                    values[field] = text
                else:
                    problems.append(f"{variable}: is empty; unset it for the default")
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            problems += map(_line, error.errors(include_url=False))
            raise SpecError("\n".join(sorted(problems))) from error
        if problems:
            raise SpecError("\n".join(sorted(problems)))
        return settings


def _line(problem: ErrorDetails) -> str:
    field = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, Settings.model_fields, n=1)
        hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
        return f"{PREFIX}{field.upper()}: unknown setting{hint}"
    return f"{PREFIX}{field.upper()}: {problem['msg']} (got {problem['input']!r})"
