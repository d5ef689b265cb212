"""What can be known of the local platform before Ray is started."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from serve.runtime.local import PlatformError, free_ports, require_free_port


def test_a_port_that_is_taken_names_who_has_it():
    named = rf"is taken .*process {os.getpid()} .*another with --port"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PlatformError, match=named):
        require_free_port("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("host", ["192.0.2.77", "nowhere.invalid", "a..b"])
def test_an_address_that_is_not_this_machine_s_is_not_called_taken(host: str):
    with pytest.raises(PlatformError, match=r"cannot be listened on .*--host takes an address of this machine") as told:
        require_free_port(host, 18131)
    assert "taken" not in str(told.value)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells which ports connections are given")
def test_free_ports_are_none_that_a_connection_may_be_given():
    first_of_connections = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(50):
        found = free_ports(9)
        assert found == sorted(set(found))
        assert found[-1] + 900 < first_of_connections  # replicas take those above the last
        for port in found:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))


def test_a_port_that_something_listens_on_is_not_free(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("serve.runtime.local._PORTS", (port, 20_123))
        assert {free_ports(1)[0] for _ in range(20)} == {20_123}
