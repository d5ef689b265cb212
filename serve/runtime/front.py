"""Where HAProxy listens: Ray 2.60 opens its counters on every address, and has one host for it and what is behind."""

from __future__ import annotations

_FRONT = "bind {{ config.frontend_host }}:{{ config.frontend_port }}"
_COUNTERS = ("bind :{{ config.metrics_port }}", "bind *:{{ config.stats_port }}")


def listen_on(host: str) -> None:
    """Have HAProxy serve on `host` and keep its counters to this machine, in this process and its forks.

    Raises:
        RuntimeError: Ray's template is another than the one known here.
    """
    from ray.serve._private import haproxy

    for line, address in ((_FRONT, host), *((line, "127.0.0.1") for line in _COUNTERS)):
        if line not in haproxy.HAPROXY_CONFIG_TEMPLATE:
            raise RuntimeError(f"Ray's HAProxy template no longer has {line!r}")
        changed = f"bind {address}:{line.rpartition(':')[2]}"
        haproxy.HAPROXY_CONFIG_TEMPLATE = haproxy.HAPROXY_CONFIG_TEMPLATE.replace(line, changed)
