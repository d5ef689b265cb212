"""Settings come from the environment once, and a variable that is wrong is named with the likely fix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from serve.errors import SpecError
from serve.settings import Settings


def problems_of(environment: dict[str, str]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        Settings.from_environment(environment)
    return str(caught.value).split("\n")


def test_the_documentation_lists_every_one():
    page = (Path(__file__).parents[1] / "docs" / "operate.md").read_text()
    for name, field in Settings.model_fields.items():
        row = rf"^\| `ROUNDHOUSE_{name.upper()}` \| .+ \| {re.escape(str(field.description))} \|$"
        assert re.search(row, page, re.M), name


def test_an_ipv6_address_is_refused_with_its_name():
    (problem,) = problems_of({"ROUNDHOUSE_HOST": "::1"})
    assert problem.startswith("ROUNDHOUSE_HOST: ")
    assert "IPv4" in problem


def test_defaults_need_no_variable():
    settings = Settings.from_environment({"PATH": "/bin"})
    assert (settings.host, settings.port, settings.offline) == ("127.0.0.1", 8000, False)


def test_variables_are_read_with_their_types():
    settings = Settings.from_environment(
        {
            "ROUNDHOUSE_PORT": "9000",
            "ROUNDHOUSE_OFFLINE": "1",
            "ROUNDHOUSE_ALLOWED_HOSTS": "a.internal, b.internal,",
            "ROUNDHOUSE_LOG_LEVEL": "debug",
        }
    )
    assert settings.port == 9000
    assert settings.offline is True
    assert settings.allowed_hosts == ("a.internal", "b.internal")
    assert settings.log_level == "debug"


def test_a_folder_may_begin_with_the_home():
    assert Settings.from_environment({"ROUNDHOUSE_CACHE_DIR": "~/models"}).cache_dir == Path.home() / "models"


def test_an_unknown_variable_suggests_the_near_one():
    assert problems_of({"ROUNDHOUSE_CACHEDIR": "/x"}) == [
        "ROUNDHOUSE_CACHEDIR: unknown setting; did you mean ROUNDHOUSE_CACHE_DIR?"
    ]


def test_an_unknown_variable_that_is_near_to_none_suggests_none():
    assert problems_of({"ROUNDHOUSE_QQQQ": "1"}) == ["ROUNDHOUSE_QQQQ: unknown setting"]


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("ROUNDHOUSE_PORT", "0"),
        ("ROUNDHOUSE_PORT", "65536"),
        ("ROUNDHOUSE_PORT", "tcp://10.0.0.1:8000"),
        ("ROUNDHOUSE_LOG_LEVEL", "loud"),
        ("ROUNDHOUSE_OFFLINE", "perhaps"),
        ("ROUNDHOUSE_MAX_UNPACKED_RATIO", "nan"),
        ("ROUNDHOUSE_MAX_UNPACKED_RATIO", "inf"),
        ("ROUNDHOUSE_MAX_UNPACKED_BYTES", "0"),
        ("ROUNDHOUSE_CACHE_DIR", ""),
        ("ROUNDHOUSE_S3_ENDPOINT", ""),
    ],
)
def test_a_value_that_does_not_fit_is_named(variable: str, text: str):
    (line,) = problems_of({variable: text})
    assert line.startswith(f"{variable}: ")
    assert repr(text) in line or (not text and "empty" in line)


def test_every_wrong_variable_is_told_at_once():
    lines = problems_of({"ROUNDHOUSE_PORT": "x", "ROUNDHOUSE_HOSTS": "y", "ROUNDHOUSE_STATE_DIR": ""})
    assert [line.partition(":")[0] for line in lines] == [
        "ROUNDHOUSE_HOSTS",
        "ROUNDHOUSE_PORT",
        "ROUNDHOUSE_STATE_DIR",
    ]


def test_settings_do_not_change():
    with pytest.raises(ValidationError):
        Settings().port = 1


def test_settings_travel_to_other_processes_by_the_environment():
    settings = Settings.from_environment(
        {"ROUNDHOUSE_PORT": "9000", "ROUNDHOUSE_ALLOWED_HOSTS": "a.test,b.test", "ROUNDHOUSE_OFFLINE": "true"}
    )
    assert Settings.from_environment(settings.as_environment()) == settings
