"""What the raylet runs before a worker that has an environment of its own: Ray's own would import Ray to set variables.

The raylet leaves it out before others, by its name. Nothing but the standard library may be imported here.
"""

import json
import os
import sys
from itertools import dropwhile

from serve.runtime.launcher import SOCKET_VARIABLE
from serve.runtime.launcher import main as launch

SCRIPT_VARIABLE = "RH_SETUP_SCRIPT"
_CONTEXT = "--serialized-runtime-env-context="
_PYTHON = "--language=PYTHON"
# What a replica is told. Another variable may be one that a fork has read before it was forked.
_OWN = "RH_"


def main() -> None:
    """Set the variables and launch the worker; where there is more to set up, start it as Ray starts it."""
    context = next((argument for argument in sys.argv if argument.startswith(_CONTEXT)), _CONTEXT + "{}")
    asked = {name: value for name, value in json.loads(context.removeprefix(_CONTEXT)).items() if value}
    variables = asked.pop("env_vars", {})
    python = asked.pop("py_executable", sys.executable)
    # A `$` may stand for something that Ray would put in its place.
    is_plain = all(name.startswith(_OWN) and "$" not in value for name, value in variables.items())
    if asked or python != sys.executable or not is_plain or _PYTHON not in sys.argv:
        os.environ.pop(SOCKET_VARIABLE, None)
        os.execv(sys.executable, [sys.executable, os.environ[SCRIPT_VARIABLE], *sys.argv[1:]])  # noqa: S606
    os.environ.update(variables)
    # The flags that Python itself was started with come before the worker's script.
    given = dropwhile(lambda argument: argument.startswith("-"), sys.argv[1:])
    sys.argv = [argument for argument in given if argument not in (context, _PYTHON)]
    launch()


if __name__ == "__main__":
    main()
