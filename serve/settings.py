"""The environment, read once into a frozen object, so that no other module depends on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.errors import SpecError

PREFIX = "ROUNDHOUSE_"


class Settings(BaseModel):
    """What an operator sets for a whole process; each field is `ROUNDHOUSE_<FIELD>` in the environment.

    Lists are comma-separated there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    offline: bool = Field(
        default=False, description="Never touch the network; use what is cached."
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description="Hosts that downloads may reach although their address is private, or although another host redirected there.",
    )
    max_unpacked_bytes: int = Field(
        default=200 * 1024**3,
        ge=1,
        description="Bytes that one archive may expand to.",
    )
    max_unpacked_ratio: float = Field(
        default=200.0, ge=1, description="How many times its own size an archive may expand to."
    )
    hf_endpoint: str = Field(default="https://huggingface.co", description="The hub behind `hf:`.")
    s3_endpoint: str | None = Field(
        default=None, description="An S3-compatible server behind `s3:`."
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read `ROUNDHOUSE_*`.

        Raises:
            SpecError: A variable is unknown or its value does not fit.
        """
        source = os.environ if environment is None else environment
        values: dict[str, object] = {}
        for variable, text in source.items():
            if variable.startswith(PREFIX):
                field = variable[len(PREFIX) :].lower()
                values[field] = (
                    tuple(part.strip() for part in text.split(",") if part.strip())
                    if field == "allowed_hosts"
                    else text
                )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [
                f"{PREFIX}{str(problem['loc'][0]).upper()}: {problem['msg']} (got {problem['input']!r})"
                for problem in error.errors()
            ]
            raise SpecError("\n".join(lines)) from error
