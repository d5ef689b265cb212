"""What replicas print and log is told once, with whose it is."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from serve.runtime.logs import Follower


def test_lines_are_told_once_with_their_model(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "logs")
    assert list(follower.poll()) == []
    (tmp_path / "logs" / "serve").mkdir(parents=True)
    printed = tmp_path / "logs" / "worker-ab-01-7.out"
    printed.write_text(":job_id:01000000\n:actor_name:ServeReplica:model-mini-lm:model\nhello\nhal")
    logged = tmp_path / "logs" / "serve" / "replica_model-mini-lm_model_x1.log"
    logged.write_text("WARNING slow\n")
    (tmp_path / "logs" / "serve" / "replica_gateway_gateway_x2.log").write_text("WARNING lost\n")
    (tmp_path / "logs" / "worker-ab-02-8.err").write_text("Fatal\n:actor_name:SERVE_CONTROLLER_ACTOR\nbusy\n")
    (tmp_path / "logs" / "raylet.out").write_text("not a replica's\n")
    assert list(follower.poll()) == [
        "mini-lm | hello",
        "ray | Fatal",
        "controller | busy",
        "gateway | WARNING lost",
        "mini-lm | WARNING slow",
    ]
    with printed.open("a") as file:
        file.write("f\n\nend\n")
    assert list(follower.poll()) == ["mini-lm | half", "mini-lm | end"]
    printed.unlink()
    assert list(follower.poll()) == []


@given(
    st.lists(st.binary(max_size=40).filter(lambda each: b"\n" not in each and not each.startswith(b":")), max_size=9)
)
def test_however_lines_arrive_none_is_lost(tmp_path_factory, lines: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("logs")
    follower, path, told = Follower(folder), folder / "worker-a.out", []
    for byte in b"".join(line + b"\n" for line in lines):
        with path.open("ab") as file:
            file.write(bytes([byte]))
        told += follower.poll()
    assert told == [f"ray | {line.decode(errors='replace')}" for line in lines if line]
