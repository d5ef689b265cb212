"""What the raylet runs to start a worker: hands the worker over to the fork server and waits for its end.

It stays as the process that the raylet knows until the worker has registered; if it is killed, the worker ends, and if
the worker ends, it does. Nothing but the standard library may be imported here: this is what makes a worker quick.
"""

import array
import json
import os
import socket
import sys

SOCKET_VARIABLE = "RH_FORK_SERVER"
SCRIPT_VARIABLE = "RH_WORKER_SCRIPT"
FORKED = b"1"


def send_order(connection: socket.socket, order: dict, streams: tuple = ()) -> None:  # type: ignore[type-arg]
    """Send an order and the streams that go with it."""
    body = json.dumps(order).encode()
    passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))] if streams else []
    connection.sendmsg([len(body).to_bytes(8, "little")], passed)
    connection.sendall(body)


def main() -> None:
    """Send this process's arguments, environment, folder and standard streams; once it has its fork, wait."""
    connection = socket.socket(socket.AF_UNIX)
    order = {"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109
    try:
        connection.connect(os.environ[SOCKET_VARIABLE])
        send_order(connection, order, (0, 1, 2))
        if connection.recv(1) != FORKED:
            raise OSError("no worker was forked")
    except (KeyError, OSError):
        # Without the fork server a worker starts as Ray starts it: slowly, but it starts.
        os.execv(sys.executable, [sys.executable, os.environ[SCRIPT_VARIABLE], *sys.argv[1:]])  # noqa: S606
    os.dup2(connection.fileno(), 0)
    # An interpreter that only waits would keep its memory; cat waits for the same end of file in almost none.
    os.execv("/bin/cat", ["cat"])  # noqa: S606


if __name__ == "__main__":
    main()
