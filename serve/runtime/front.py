"""Where HAProxy listens and what it says itself: Ray 2.60 has one host for all, and errors in a text of its own."""

from __future__ import annotations

from serve.api.wire import PROXYS_OWN

_FRONT = "bind {{ config.frontend_host }}:{{ config.frontend_port }}"
_COUNTERS = ("bind :{{ config.metrics_port }}", "bind *:{{ config.stats_port }}")
# Ray's errors for every backend: 500 and two words, whatever happened.
_RAYS_ERRORS = "{%- if config.error_file_path %}"

_LOST = (
    "the replica went away before its answer was there; whether it was computed is not known, and it was not repeated"
)
_NOBODY = "nothing answers here yet: the platform is starting, or a part of it is on its way back"
_LATE = "no answer came in time"
# What the proxy refuses before it has read a request (400, 408) has no setting. What OpenAI's clients read in an error
# beside its sentence stands in variables, which are empty for all others.
_ERRORS = rf"""
    acl openai_words path_beg /v1/
    acl openai_words path_sub /v1/
    http-request set-var-fmt(txn.error_open) '{{"message": ' if openai_words
    http-request set-var-fmt(txn.error_502) ', "type": "server_error", "param": null, "code": "replica_lost"}}' if openai_words
    http-request set-var-fmt(txn.error_503) ', "type": "server_error", "param": null, "code": "model_not_ready"}}' if openai_words
    http-request set-var-fmt(txn.error_504) ', "type": "timeout_error", "param": null, "code": "deadline_exceeded"}}' if openai_words
    http-error status 502 content-type application/json hdr {PROXYS_OWN.decode()} 1 hdr retry-after 1 lf-string '{{"error": %[var(txn.error_open)]"{_LOST}"%[var(txn.error_502)]}}'
    http-error status 503 content-type application/json hdr {PROXYS_OWN.decode()} 1 hdr retry-after 1 lf-string '{{"error": %[var(txn.error_open)]"{_NOBODY}"%[var(txn.error_503)]}}'
    http-error status 504 content-type application/json hdr {PROXYS_OWN.decode()} 1 lf-string '{{"error": %[var(txn.error_open)]"{_LATE}"%[var(txn.error_504)]}}'
    http-after-response set-status 503 if {{ status 502 }} {{ res.hdr({PROXYS_OWN.decode()}) -m found }}"""  # noqa: E501


def stand_in_front(host: str) -> None:
    """Have HAProxy, in this process and its forks, serve on `host` and tell its errors as the platform does.

    Its counters are kept to this machine.

    Raises:
        RuntimeError: Ray's template is another than the one known here.
    """
    for line, address in ((_FRONT, host), *((line, "127.0.0.1") for line in _COUNTERS)):
        _replace(line, f"bind {address}:{line.rpartition(':')[2]}" + (_ERRORS if line is _FRONT else ""))
    _replace(_RAYS_ERRORS, "{%- if false %}")


def _replace(known: str, by: str) -> None:
    from ray.serve._private import haproxy

    if known not in haproxy.HAPROXY_CONFIG_TEMPLATE:
        raise RuntimeError(f"Ray's HAProxy template no longer has {known!r}")
    haproxy.HAPROXY_CONFIG_TEMPLATE = haproxy.HAPROXY_CONFIG_TEMPLATE.replace(known, by)
