"""What stands before a worker with variables of its own, run as the raylet runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve.runtime import launcher, setup_worker

SHOW = "import os, sys\nprint({name!r}, os.environ.get('RH_ONE'), 'RH_FORK_SERVER' in os.environ, sys.argv[1:])"


def told(folder: Path, context: dict[str, Any], *flags: str) -> tuple[str, list[str]]:
    """Return what was started, a worker or Ray's own script, and what the raylet had given."""
    environment = {**os.environ, launcher.SOCKET_VARIABLE: str(folder / "nobody")}
    for variable, name in ((launcher.SCRIPT_VARIABLE, "worker"), (setup_worker.SCRIPT_VARIABLE, "ray")):
        environment[variable] = str(folder / f"{name}.py")
        (folder / f"{name}.py").write_text(SHOW.format(name=name))
    context_text = f"--serialized-runtime-env-context={json.dumps(context)}"
    given = [*flags, launcher.__file__, "--a=b", "--language=PYTHON", context_text]
    command = [sys.executable, setup_worker.__file__, *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip(), given


@pytest.mark.parametrize("flags", [(), ("-s",), ("-S", "-s")])
@pytest.mark.parametrize("variable", [None, "1 \N{SNOWMAN}"])
def test_a_replicas_variables_are_set_here(tmp_path: Path, variable: str | None, flags: tuple[str, ...]):
    context = {"env_vars": {"RH_ONE": variable} if variable else {}, "py_executable": sys.executable, "java_jars": []}
    assert told(tmp_path, context, *flags)[0] == f"worker {variable} True ['--a=b']"


@pytest.mark.parametrize(
    "context",
    [
        {"env_vars": {"RH_ONE": "$HOME"}},
        {"env_vars": {"RH_ONE": "1"}, "command_prefix": ["nice"]},
        {"env_vars": {"PYTHONPATH": "/another"}},
        {"py_executable": "/another/python"},
        {"override_worker_entrypoint": "/another.py"},
    ],
)
def test_all_else_is_left_to_ray_and_not_forked(tmp_path: Path, context: dict[str, Any]):
    started, given = told(tmp_path, context)
    assert started == f"ray None False {given}"


def test_ray_still_leaves_it_out_by_its_name():
    from ray._private import ray_constants

    assert Path(setup_worker.__file__).name.endswith(ray_constants.SETUP_WORKER_FILENAME)


def test_ray_knows_no_more_of_an_environment_than_is_known_here():
    from ray._private.runtime_env.context import RuntimeEnvContext

    known = {"env_vars", "py_executable", "command_prefix", "override_worker_entrypoint", "java_jars"}
    assert set(json.loads(RuntimeEnvContext().serialize())) == known
