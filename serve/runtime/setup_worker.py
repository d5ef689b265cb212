"""What the raylet runs before a worker that has an environment of its own: Ray's own would import Ray to set variables.

The raylet leaves it out before others, by its name. Nothing but the standard library may be imported here.
"""

import json
import os
import sys

from serve.runtime.launcher import main as launch

SCRIPT_VARIABLE = "RH_SETUP_SCRIPT"
_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="


def main() -> None:
    """Set the variables and launch the worker; where there is more to set up, become Ray's own."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith((_CONTEXT, _LANGUAGE))]
    context = next((argument for argument in sys.argv if argument.startswith(_CONTEXT)), _CONTEXT + "{}")
    asked = {name: value for name, value in json.loads(context.removeprefix(_CONTEXT)).items() if value}
    variables = asked.pop("env_vars", {})
    is_own = asked.pop("py_executable", sys.executable) == sys.executable and not asked
    # What Ray would put in place of a name.
    if not is_own or any("$" in value for value in variables.values()):
        os.execv(sys.executable, [sys.executable, os.environ[SCRIPT_VARIABLE], *sys.argv[1:]])  # noqa: S606
    os.environ.update(variables)
    sys.argv = arguments
    launch()


if __name__ == "__main__":
    main()
