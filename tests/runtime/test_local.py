"""What can be known of the local platform before Ray is started."""

from __future__ import annotations

import os
import socket

import pytest

from serve.runtime.local import PlatformError, require_free_port


def test_a_port_that_is_taken_names_who_has_it():
    named = rf"is taken .*process {os.getpid()} .*another with --port"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PlatformError, match=named):
        require_free_port("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("host", ["192.0.2.77", "nowhere.invalid", "a..b"])
def test_an_address_that_is_not_this_machine_s_is_not_called_taken(host: str):
    with pytest.raises(PlatformError, match=r"cannot be listened on .*--host takes an address of this machine") as told:
        require_free_port(host, 18131)
    assert "taken" not in str(told.value)
