"""HAProxy's ports for its own counters, kept to this machine: Ray 2.60 opens them on every address."""

from __future__ import annotations

_OPEN = ("bind :{{ config.metrics_port }}", "bind *:{{ config.stats_port }}")


def keep_to_this_machine() -> None:
    """Change the template that this process, or a fork of it, writes HAProxy's configuration from.

    Raises:
        RuntimeError: Ray's template is another than the one known here.
    """
    from ray.serve._private import haproxy

    for line in _OPEN:
        if line not in haproxy.HAPROXY_CONFIG_TEMPLATE:
            raise RuntimeError(f"Ray's HAProxy template no longer has {line!r}")
        local = "bind 127.0.0.1:" + line.partition(":")[2]
        haproxy.HAPROXY_CONFIG_TEMPLATE = haproxy.HAPROXY_CONFIG_TEMPLATE.replace(line, local)
