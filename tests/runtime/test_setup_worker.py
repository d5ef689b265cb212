"""What stands before a worker with variables of its own, run as the raylet runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve.runtime import launcher, setup_worker


@pytest.mark.parametrize(
    ("context", "told"),
    [
        ({"env_vars": {"ONE": "1 \N{SNOWMAN}"}}, "worker 1 \N{SNOWMAN} ['--a=b']"),
        (
            {"env_vars": {}, "py_executable": sys.executable, "command_prefix": [], "java_jars": []},
            "worker None ['--a=b']",
        ),
        ({"env_vars": {"ONE": "$HOME"}}, "ray"),
        ({"env_vars": {"ONE": "1"}, "command_prefix": ["nice"]}, "ray"),
        ({"py_executable": "/another/python"}, "ray"),
        ({"override_worker_entrypoint": "/another.py"}, "ray"),
    ],
)
def test_variables_are_set_here_and_all_else_is_left_to_ray(tmp_path: Path, context: dict[str, object], told: str):
    environment = dict(os.environ)
    for variable, name in ((launcher.SCRIPT_VARIABLE, "worker"), (setup_worker.SCRIPT_VARIABLE, "ray")):
        environment[variable] = str(tmp_path / f"{name}.py")
        (tmp_path / f"{name}.py").write_text(f"import os, sys\nprint({name!r}, os.environ.get('ONE'), sys.argv[1:])")
    environment[launcher.SOCKET_VARIABLE] = str(tmp_path / "nobody")
    given = [launcher.__file__, "--a=b", "--language=PYTHON", f"--serialized-runtime-env-context={json.dumps(context)}"]
    done = subprocess.run(
        [sys.executable, setup_worker.__file__, *given],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == (told if told != "ray" else f"ray None {given}")


def test_ray_still_leaves_it_out_by_its_name():
    from ray._private import ray_constants

    assert Path(setup_worker.__file__).name.endswith(ray_constants.SETUP_WORKER_FILENAME)


def test_ray_knows_no_more_of_an_environment_than_is_known_here():
    from ray._private.runtime_env.context import RuntimeEnvContext

    known = {"env_vars", "py_executable", "command_prefix", "override_worker_entrypoint", "java_jars"}
    assert set(json.loads(RuntimeEnvContext().serialize())) == known
