"""A source becomes a verified local folder, whatever the line, the server or the archive does."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import random
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest
import trustme
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from serve.errors import SourceError
from serve.settings import Settings
from serve.sources import Source, fetch, parse_source
from serve.sources.archive import unpack
from serve.spec import ModelSpec
from tests.file_server import FileServer, Line, content, endless, file_server, redirect, status

BODY = random.Random(7).randbytes(3 * 2**20 + 17)


def spec(source: str, *, task: str = "text-embedding", **fields: object) -> ModelSpec:
    options = {"class": "Own"} if task == "python" else {}
    return ModelSpec.model_validate({"name": "m", "task": task, "source": source, "options": options, **fields})


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def left_behind(cache_dir: Path) -> list[Path]:
    """Return every file in the cache that has content."""
    return [path for path in cache_dir.rglob("*") if path.is_file() and path.stat().st_size]


@pytest.fixture
def quick(tmp_path: Path) -> Settings:
    """Settings that wait little and may reach this machine."""
    return Settings(
        cache_dir=tmp_path / "cache",
        allowed_hosts=("localhost",),
        download_attempts=3,
        download_backoff_s=0.01,
        download_timeout_s=5,
    )


def get(
    settings: Settings, source: str, progress: Callable[[int, int], None] = lambda *_: None, **fields: object
) -> Path:
    return fetch(spec(source, **fields), settings=settings, base_dir=Path("/"), progress=progress)


class TestParsing:
    @pytest.mark.parametrize(
        ("text", "source"),
        [
            ("package:a.b/c/d", Source("package", "a.b", "c/d")),
            ("package:a", Source("package", "a")),
            ("file:../x y", Source("file", "../x y")),
            ("hf:org/repo", Source("hf", "org/repo")),
            ("hf:org/repo/sub/file.gguf", Source("hf", "org/repo", "sub/file.gguf")),
            ("hf:repo", Source("hf", "repo")),
            ("s3://bucket/a/b/", Source("s3", "bucket", "a/b")),
            ("gs://bucket", Source("gs", "bucket")),
            ("https://Host:8443/a/b.zip?key=1", Source("https", "host:8443", "/a/b.zip", "key=1")),
            ("https://[::1]:8443/a", Source("https", "[::1]:8443", "/a")),
        ],
    )
    def test_a_source_is_taken_apart(self, text: str, source: Source):
        assert parse_source(text) == source

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("models/minilm", "package:"),
            ("./models", "did you mean 'file:./models'"),
            ("http://h/f", "did you mean 'https://h/f'"),
            ("hf:org/../repo", "hf:org/../repo"),
            ("hf:org/repo/../../x", "hf:org/repo/../../x"),
            ("package:a/../b", "package:a/../b"),
            ("s3://bucket/a/../b", "s3://bucket/a/../b"),
            ("s3://bucket/a//b", "s3://bucket/a//b"),
            ("s3://arn:aws:s3/x", "bucket"),
            ("https://user@host/f", "HOST/FILE"),
            ("https://host/", "HOST/FILE"),
            ("https://host/folder/", "one file"),
            ("https://host:99999/f", "65535"),
            ("https://ho_st!/f", "not a host"),
            ("https://host\\@evil/f", "HOST/FILE"),
        ],
    )
    def test_what_is_none_says_how_it_should_read(self, text: str, says: str):
        with pytest.raises(SourceError, match=re.escape(says)):
            parse_source(text)

    @given(st.text(max_size=40), st.sampled_from(["", "hf:", "s3://", "gs:", "https://", "package:", "file:"]))
    @example("a/../../b", "hf:")
    def test_nothing_parses_into_a_path_that_climbs(self, text: str, scheme: str):
        try:
            source = parse_source(scheme + text)
        except SourceError:
            return
        if source.scheme in ("hf", "s3", "gs", "package"):
            assert not {"", ".", ".."} & set(source.path.split("/") if source.path else [])
            assert parse_source(str(source)) == source

    def test_a_query_is_not_shown(self):
        assert "hush" not in str(parse_source("https://h/f?token=hush"))


class TestPackages:
    @pytest.fixture(autouse=True)
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "weights_for_tests"
        (folder / "data").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('it was imported')")
        (folder / "inner.py").write_text("raise RuntimeError('it was imported')")
        (folder / "data" / "w.bin").write_bytes(b"w")
        (tmp_path / "lone_module_for_tests.py").write_text("raise RuntimeError('it was imported')")
        monkeypatch.syspath_prepend(str(tmp_path))
        return folder

    def test_the_package_and_what_is_in_it_are_found_without_importing_it(self, quick: Settings, package: Path):
        assert get(quick, "package:weights_for_tests") == package
        assert get(quick, "package:weights_for_tests/data") == package / "data"
        assert get(quick, "package:weights_for_tests.data") == package / "data"
        assert get(quick, "package:weights_for_tests.inner") == package / "inner.py"
        assert get(quick, "package:weights_for_tests/data/w.bin") == package / "data" / "w.bin"
        assert get(quick, "package:lone_module_for_tests") == package.parent / "lone_module_for_tests.py"

    def test_what_is_not_there_says_what_to_do(self, quick: Settings):
        with pytest.raises(SourceError, match="pip install no-such-weights"):
            get(quick, "package:no_such_weights/model")
        with pytest.raises(SourceError, match=r"weights_for_tests/date is not there; beside it are data, inner\.py"):
            get(quick, "package:weights_for_tests/date")
        with pytest.raises(SourceError, match="is not there"):
            get(quick, "package:lone_module_for_tests/data")

    def test_no_network_library_is_imported_for_it(self, tmp_path: Path):
        code = (
            "import sys; from pathlib import Path; from serve.sources import fetch; from serve.spec import ModelSpec\n"
            "from serve.settings import Settings\n"
            "spec = ModelSpec(name='m', task='forecast', source='package:pytest')\n"
            "fetch(spec, settings=Settings(), base_dir=Path('.'), progress=lambda *_: None)\n"
            "print([m for m in ('httpx', 'http.client', 'ssl', 'fsspec', 'huggingface_hub') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "[]", done.stderr


class TestFiles:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        folder = tmp_path / "here" / "model"
        folder.mkdir(parents=True)
        (folder / "w.bin").write_bytes(b"w")
        return folder

    def find(self, source: str, base_dir: Path) -> Path:
        return fetch(spec(source), settings=Settings(), base_dir=base_dir, progress=lambda *_: None)

    def test_a_path_is_relative_to_the_declaration_or_absolute(self, model: Path):
        assert self.find("file:model", model.parent) == model
        assert self.find("file:./model/w.bin", model.parent) == model / "w.bin"
        assert self.find(f"file:{model}", Path("/")) == model
        assert self.find("file:model/../model", model.parent) == model

    def test_climbing_out_of_the_declarations_folder_is_refused(self, model: Path):
        with pytest.raises(SourceError, match=f"give the absolute path, file:{model}"):
            self.find("file:../model", model.parent / "other")

    def test_links_may_stay_inside_and_not_leave(self, model: Path):
        (model / "same.bin").symlink_to("w.bin")
        assert self.find("file:model", model.parent) == model
        (model.parent / "named").symlink_to(model)
        assert self.find("file:named", model.parent) == model
        (model / "deep").mkdir()
        (model / "deep" / "out").symlink_to("../../secret")
        with pytest.raises(SourceError, match="link that leaves"):
            self.find("file:model", model.parent)

    def test_a_link_to_a_folder_beside_it_is_refused(self, model: Path):
        (model.parent / "model-2").mkdir()
        (model / "out").symlink_to("../model-2")
        with pytest.raises(SourceError, match="link that leaves"):
            self.find("file:model", model.parent)

    def test_a_pipe_is_refused(self, model: Path):
        os.mkfifo(model / "pipe")
        with pytest.raises(SourceError, match="a pipe"):
            self.find("file:model", model.parent)
        with pytest.raises(SourceError, match="neither a folder nor a file"):
            self.find("file:model/pipe", model.parent)

    def test_an_absent_path_names_what_is_beside_it(self, model: Path):
        with pytest.raises(SourceError, match="mode is not there; beside it are model"):
            self.find("file:mode", model.parent)

    def test_a_link_to_itself_is_an_error(self, model: Path):
        (model.parent / "loop").symlink_to("loop")
        with pytest.raises(SourceError, match="loop"):
            self.find("file:loop", model.parent)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, Path]:
    ca = trustme.CA()
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return ca, path


def server_context(ca: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*names).configure_cert(context)
    return context


@pytest.fixture
def trusted(authority: tuple[trustme.CA, Path], monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority[1]))
    return authority[0]


@pytest.fixture
def server(trusted: trustme.CA) -> Iterator[FileServer]:
    with file_server(server_context(trusted, "localhost")) as running:
        running.answers["/model.bin"] = content(BODY)
        yield running


FETCH = """
import sys, resource
from pathlib import Path
from serve.sources import fetch
from serve.settings import Settings
from serve.spec import ModelSpec
from serve.errors import SourceError
settings = Settings.model_validate_json(sys.argv[1])
spec = ModelSpec.model_validate_json(sys.argv[2])
if sys.argv[3:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    print(fetch(spec, settings=settings, base_dir=Path("/"), progress=lambda *_: None))
except SourceError as error:
    print(error)
    sys.exit(3)
"""


def fetch_elsewhere(settings: Settings, wanted: ModelSpec, *arguments: str) -> subprocess.Popen[str]:
    """Begin to fetch in a process of its own; it prints the path, or the error and exits with 3."""
    command = [
        sys.executable,
        "-c",
        FETCH,
        settings.model_dump_json(),
        wanted.model_dump_json(by_alias=True),
        *arguments,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


class TestHttps:
    def test_a_file_arrives_with_its_name_and_stays(self, quick: Settings, server: FileServer):
        seen: list[tuple[int, int]] = []
        path = get(quick, f"{server.url}/model.bin", lambda *now: seen.append(now), sha256=sha256(BODY))
        assert path.name == "model.bin"
        assert path.read_bytes() == BODY
        assert seen[-1] == (len(BODY), len(BODY))
        offline = quick.model_copy(update={"offline": True})
        assert get(offline, f"{server.url}/model.bin", sha256=sha256(BODY)) == path
        assert len(server.seen) == 1

    def test_offline_and_not_cached_is_an_error(self, quick: Settings, server: FileServer):
        with pytest.raises(SourceError, match="offline is set"):
            get(quick.model_copy(update={"offline": True}), f"{server.url}/model.bin", sha256=sha256(BODY))
        assert not server.seen

    def test_a_break_goes_on_where_it_was(self, quick: Settings, server: FileServer):
        server.once["/model.bin"] = [content(BODY, cut_after=2**20 + 1), content(BODY, cut_after=5)]
        path = get(quick, f"{server.url}/model.bin", sha256=sha256(BODY))
        assert path.read_bytes() == BODY
        assert [one.headers.get("range") for one in server.seen] == [None, "bytes=1048577-", "bytes=1048582-"]

    def test_a_server_without_ranges_begins_anew(self, quick: Settings, server: FileServer):
        server.once["/model.bin"] = [content(BODY, cut_after=1000), content(BODY, ranges=False)]
        seen: list[tuple[int, int]] = []
        path = get(quick, f"{server.url}/model.bin", lambda *now: seen.append(now), sha256=sha256(BODY))
        assert path.read_bytes() == BODY
        assert seen[-1] == (len(BODY), len(BODY))

    def test_a_range_that_begins_elsewhere_is_not_used(self, quick: Settings, server: FileServer):
        server.once["/model.bin"] = [content(BODY, cut_after=1000), content(BODY, lie_start=True)]
        assert get(quick, f"{server.url}/model.bin", sha256=sha256(BODY)).read_bytes() == BODY

    def test_tries_are_bounded_and_the_part_is_kept(self, quick: Settings, server: FileServer):
        server.answers["/model.bin"] = content(BODY, cut_after=1000)
        with pytest.raises(SourceError, match="gave up after 3 tries: the connection ended after 3000 of"):
            get(quick, f"{server.url}/model.bin", sha256=sha256(BODY))
        server.answers["/model.bin"] = content(BODY)
        assert get(quick, f"{server.url}/model.bin", sha256=sha256(BODY)).read_bytes() == BODY
        assert server.seen[-1].headers["range"] == "bytes=3000-"

    def test_tries_that_bring_much_are_not_counted(self, quick: Settings, server: FileServer):
        server.once["/model.bin"] = [content(BODY, cut_after=2**19 + 2**18)] * 4
        assert get(quick, f"{server.url}/model.bin", sha256=sha256(BODY)).read_bytes() == BODY

    def test_a_wrong_hash_leaves_nothing(self, quick: Settings, server: FileServer):
        with pytest.raises(SourceError, match=f"sha256 {sha256(BODY)} and not {'ab' * 32}"):
            get(quick, f"{server.url}/model.bin", sha256="ab" * 32)
        assert left_behind(quick.cache_dir) == []
        assert len(server.seen) == 1

    def test_a_part_of_something_else_is_dropped(self, quick: Settings, server: FileServer):
        server.answers["/model.bin"] = content(b"x" * len(BODY), cut_after=1000)
        with pytest.raises(SourceError):
            get(quick, f"{server.url}/model.bin", sha256=sha256(BODY))
        server.answers["/model.bin"] = content(BODY)
        assert get(quick, f"{server.url}/model.bin", sha256=sha256(BODY)).read_bytes() == BODY

    def test_a_part_that_is_complete_is_only_checked(self, quick: Settings, server: FileServer):
        server.answers["/model.bin"] = content(BODY, length=len(BODY) + 9)
        server.once["/model.bin"] = [content(BODY, length=len(BODY) + 9), status(500), status(500)]
        with pytest.raises(SourceError):
            get(quick, f"{server.url}/model.bin", sha256=sha256(BODY))
        server.answers["/model.bin"] = content(BODY)
        assert get(quick, f"{server.url}/model.bin", sha256=sha256(BODY)).read_bytes() == BODY

    def test_a_length_that_promises_more_is_a_break(self, quick: Settings, server: FileServer):
        server.answers["/model.bin"] = content(BODY, ranges=False, length=len(BODY) + 1)
        with pytest.raises(SourceError, match=f"ended after {len(BODY)} of {len(BODY) + 1} bytes"):
            get(quick, f"{server.url}/model.bin", sha256=sha256(BODY))

    def test_a_length_that_promises_less_is_a_wrong_hash(self, quick: Settings, server: FileServer):
        server.answers["/model.bin"] = content(BODY, length=1000)
        with pytest.raises(SourceError, match="and not"):
            get(quick, f"{server.url}/model.bin", sha256=sha256(BODY))
        assert left_behind(quick.cache_dir) == []

    def test_a_length_beyond_the_disk_is_refused_before_a_byte(self, quick: Settings, server: FileServer):
        server.answers["/model.bin"] = content(BODY, length=2**56)
        huge = quick.model_copy(update={"max_unpacked_bytes": 2**60})
        with pytest.raises(SourceError, match=r"no room in .*it takes 72057594\.04 GB more"):
            get(huge, f"{server.url}/model.bin", sha256=sha256(BODY))
        assert left_behind(quick.cache_dir) == []

    def test_an_endless_answer_ends(self, quick: Settings, server: FileServer):
        stop = threading.Event()
        server.answers["/model.bin"] = endless(b"x" * 2**16, stop)
        bounded = quick.model_copy(update={"max_unpacked_bytes": 2**20})
        with pytest.raises(SourceError, match="MAX_UNPACKED_BYTES"):
            get(bounded, f"{server.url}/model.bin", sha256=sha256(BODY))
        stop.set()

    def test_a_trickle_is_a_break(self, quick: Settings, server: FileServer):
        stop = threading.Event()
        server.answers["/model.bin"] = endless(b"x", stop, wait_s=0.05)
        hasty = quick.model_copy(update={"download_timeout_s": 0.3, "download_attempts": 2})
        with pytest.raises(SourceError, match="too few"):
            get(hasty, f"{server.url}/model.bin", sha256=sha256(BODY))
        stop.set()

    def test_a_head_that_trickles_is_a_break(self, quick: Settings, server: FileServer):
        stop = threading.Event()

        def trickle(handler) -> None:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not stop.wait(0.05):
                handler.wfile.write(b"x")

        server.answers["/model.bin"] = trickle
        hasty = quick.model_copy(update={"download_timeout_s": 0.3, "download_attempts": 2})
        with pytest.raises(SourceError, match="gave up after 2 tries"):
            get(hasty, f"{server.url}/model.bin", sha256=sha256(BODY))
        stop.set()

    def test_a_busy_server_is_asked_again_and_a_refusal_is_not(self, quick: Settings, server: FileServer):
        server.once["/model.bin"] = [status(503, {"Retry-After": "0"}), status(429)]
        assert get(quick, f"{server.url}/model.bin", sha256=sha256(BODY)).read_bytes() == BODY
        with pytest.raises(SourceError, match="404"):
            get(quick, f"{server.url}/absent.bin", sha256=sha256(BODY))
        assert len(server.asked("/absent.bin")) == 1

    def test_a_query_goes_to_the_server_and_not_into_the_error(self, quick: Settings, server: FileServer):
        with pytest.raises(SourceError) as caught:
            get(quick, f"{server.url}/absent.bin?token=hush", sha256=sha256(BODY))
        assert "hush" not in str(caught.value)
        assert server.seen[0].path == "/absent.bin?token=hush"

    def test_an_unknown_authority_is_not_trusted(
        self, quick: Settings, server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ):
        trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "other.pem"))
        with pytest.raises(SourceError, match="SSL_CERT_FILE"):
            get(quick, f"{server.url}/model.bin", sha256=sha256(BODY))
        assert not server.seen

    def test_a_certificate_of_another_host_is_not_trusted(self, quick: Settings, trusted: trustme.CA):
        context = server_context(trusted, "elsewhere.test")
        with file_server(context) as running, pytest.raises(SourceError, match="not trusted"):
            get(quick, f"{running.url}/model.bin", sha256=sha256(BODY))

    def test_what_progress_raises_stops_it_and_it_goes_on_later(self, quick: Settings, server: FileServer):
        def leave(done: int, total: int) -> None:
            if done:
                raise KeyError("left")

        with pytest.raises(KeyError, match="left"):
            get(quick, f"{server.url}/model.bin", leave, sha256=sha256(BODY))
        assert get(quick, f"{server.url}/model.bin", sha256=sha256(BODY)).read_bytes() == BODY


class TestReach:
    def test_a_private_address_is_refused(self, quick: Settings, server: FileServer):
        with pytest.raises(SourceError, match=r"this machine itself.*ROUNDHOUSE_ALLOWED_HOSTS"):
            get(quick.model_copy(update={"allowed_hosts": ()}), f"{server.url}/model.bin", sha256=sha256(BODY))
        assert not server.seen

    def test_a_host_may_be_allowed_with_its_port(self, quick: Settings, server: FileServer):
        near = quick.model_copy(update={"allowed_hosts": (f"localhost:{server.port}",)})
        assert get(near, f"{server.url}/model.bin", sha256=sha256(BODY)).read_bytes() == BODY
        far = quick.model_copy(update={"allowed_hosts": ("localhost:1",), "cache_dir": quick.cache_dir / "2"})
        with pytest.raises(SourceError, match="this machine itself"):
            get(far, f"{server.url}/model.bin", sha256=sha256(BODY))

    @pytest.mark.parametrize(
        "address",
        [
            "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254",
            "100.100.100.200", "100.64.0.1", "168.63.129.16", "224.0.0.1", "255.255.255.255", "240.0.0.1",
            "192.0.0.192", "198.18.0.1", "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "fec0::1",
            "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::",
            "::127.0.0.1",
        ],
    )  # fmt: skip
    def test_addresses_that_are_not_public_are_refused(
        self, quick: Settings, address: str, monkeypatch: pytest.MonkeyPatch
    ):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 443))
        place = (family, socket.SOCK_STREAM, 6, "", (address, 443))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [public, place])
        monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it connected"))
        with pytest.raises(SourceError, match="ROUNDHOUSE_ALLOWED_HOSTS"):
            get(quick, "https://models.test/m.bin", sha256=sha256(BODY))

    @pytest.mark.parametrize(
        "address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"]
    )
    def test_the_address_that_was_judged_is_the_one_connected_to(
        self, quick: Settings, address: str, monkeypatch: pytest.MonkeyPatch
    ):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        answers = [address]
        reached: list[str] = []

        def resolve(*_: object, **__: object) -> list[tuple[object, ...]]:
            return [(family, socket.SOCK_STREAM, 6, "", (answers.pop() if answers else "127.0.0.1", 443))]

        def connect(_: socket.socket, place: tuple[str, int]) -> None:
            reached.append(place[0])
            raise ConnectionRefusedError("refused")

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(socket.socket, "connect", connect)
        once = quick.model_copy(update={"download_attempts": 1})
        with pytest.raises(SourceError, match="refused"):
            get(once, "https://models.test/m.bin", sha256=sha256(BODY))
        assert reached == [address]

    def test_a_redirect_within_the_host_is_followed(self, quick: Settings, server: FileServer):
        server.answers["/latest"] = redirect("/model.bin")
        assert get(quick, f"{server.url}/latest", sha256=sha256(BODY)).read_bytes() == BODY

    def test_a_redirect_to_another_host_takes_the_operators_word(self, quick: Settings, trusted: trustme.CA):
        context = server_context(trusted, "localhost", "127.0.0.1")
        with file_server(context) as first, file_server(context, host="127.0.0.1") as second:
            second.answers["/model.bin"] = content(BODY)
            first.answers["/model.bin"] = redirect(f"{second.url}/model.bin")
            with pytest.raises(SourceError, match=r"another host, 127\.0\.0\.1"):
                get(quick, f"{first.url}/model.bin", sha256=sha256(BODY))
            assert not second.seen
            wide = quick.model_copy(update={"allowed_hosts": ("localhost", f"127.0.0.1:{second.port}")})
            assert get(wide, f"{first.url}/model.bin", sha256=sha256(BODY)).read_bytes() == BODY

    def test_a_redirect_to_plain_http_is_refused(self, quick: Settings, server: FileServer):
        with file_server() as plain:
            server.answers["/model.bin"] = redirect(f"{plain.url}/model.bin")
            here = quick.model_copy(update={"allowed_hosts": (f"localhost:{server.port}",)})
            with pytest.raises(SourceError, match="plain http"):
                get(here, f"{server.url}/model.bin", sha256=sha256(BODY))
            assert not plain.seen

    @pytest.mark.parametrize(
        "to", ["file:///etc/passwd", "ftp://localhost/x", "https://", "https://u:p@localhost/x", ""]
    )
    def test_a_redirect_to_no_url_is_refused(self, quick: Settings, server: FileServer, to: str):
        server.answers["/model.bin"] = redirect(to)
        with pytest.raises(SourceError):
            get(quick, f"{server.url}/model.bin", sha256=sha256(BODY))

    def test_redirects_in_a_circle_end(self, quick: Settings, server: FileServer):
        server.answers["/model.bin"] = redirect("/model.bin")
        with pytest.raises(SourceError, match="more than 5 times"):
            get(quick, f"{server.url}/model.bin", sha256=sha256(BODY))


class TestProcesses:
    def test_two_that_fetch_at_once_download_once(self, quick: Settings, server: FileServer):
        wanted = spec(f"{server.url}/model.bin", sha256=sha256(BODY))
        pause = threading.Event()
        server.once["/model.bin"] = [content(BODY, cut_after=1000, pause=pause)]
        processes = [fetch_elsewhere(quick, wanted) for _ in range(2)]
        pause.set()
        paths = {process.communicate(timeout=60)[0] for process in processes}
        assert [process.returncode for process in processes] == [0, 0]
        assert len(paths) == 1
        assert Path(paths.pop().strip()).read_bytes() == BODY
        assert [one.headers.get("range") for one in server.seen] == [None, "bytes=1000-"]

    def test_one_that_is_killed_is_gone_on_with(self, quick: Settings, server: FileServer):
        wanted = spec(f"{server.url}/model.bin", sha256=sha256(BODY))
        never = threading.Event()
        server.once["/model.bin"] = [content(BODY, cut_after=2**21, pause=never)]
        killed = fetch_elsewhere(quick, wanted)
        while sum(path.stat().st_size for path in left_behind(quick.cache_dir)) < 2**20:
            assert killed.poll() is None
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=60)
        never.set()
        path = get(quick, wanted.source, sha256=sha256(BODY))
        assert path.read_bytes() == BODY
        assert int(server.seen[-1].headers["range"].removeprefix("bytes=").removesuffix("-")) >= 2**20
        assert left_behind(quick.cache_dir) == [path]

    def test_a_full_disk_is_a_clear_error_with_nothing_left(self, quick: Settings, server: FileServer):
        wanted = spec(f"{server.url}/model.bin", sha256=sha256(BODY))
        full = fetch_elsewhere(quick, wanted, str(2**20))
        said, _ = full.communicate(timeout=60)
        assert full.returncode == 3
        assert f"no room in {quick.cache_dir}" in said
        assert left_behind(quick.cache_dir) == []


def tar_of(*members: tuple[tarfile.TarInfo, bytes], gz: bool = False) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz" if gz else "w") as tar:
        for info, body in members:
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return packed.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_of(*members: tuple[str, bytes, int]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, body, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            zipped.writestr(info, body)
    return packed.getvalue()


FILE = stat.S_IFREG | 0o644


class TestArchives:
    def unpacked(self, settings: Settings, server: FileServer, name: str, body: bytes) -> Path:
        server.answers[f"/{name}"] = content(body)
        return get(settings, f"{server.url}/{name}", sha256=sha256(body))

    @pytest.mark.parametrize("name", ["m.tar", "m.tar.gz", "m.TGZ", "m.zip"])
    def test_an_archive_becomes_its_folder(self, quick: Settings, server: FileServer, name: str):
        if name.endswith("zip"):
            body = zip_of(("config.json", b"{}", FILE), ("sub/", b"", 0), ("sub/w.bin", BODY, 0))
        else:
            body = tar_of(
                (member("./", tarfile.DIRTYPE), b""),
                (member("./config.json"), b"{}"),
                (member("sub", tarfile.DIRTYPE), b""),
                (member("sub/w.bin"), BODY),
                gz=name != "m.tar",
            )
        folder = self.unpacked(quick, server, name, body)
        assert (folder / "config.json").read_bytes() == b"{}"
        assert (folder / "sub" / "w.bin").read_bytes() == BODY
        assert len(left_behind(quick.cache_dir)) == 2
        assert self.unpacked(quick.model_copy(update={"offline": True}), server, name, body) == folder

    def test_the_one_folder_at_its_top_is_the_model(self, quick: Settings, server: FileServer):
        folder = self.unpacked(quick, server, "m.tar", tar_of((member("model-1/config.json"), b"{}")))
        assert (folder / "config.json").read_bytes() == b"{}"

    def test_a_hard_link_is_kept_below_a_cache_that_is_reached_by_a_link(
        self, quick: Settings, server: FileServer, tmp_path: Path
    ):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "cache").symlink_to("elsewhere")
        settings = quick.model_copy(update={"cache_dir": tmp_path / "cache"})
        tar = tar_of((member("w.bin"), b"w"), (member("hard", tarfile.LNKTYPE, "w.bin"), b""))
        assert (self.unpacked(settings, server, "m.tar", tar) / "hard").read_bytes() == b"w"

    def test_a_name_that_no_host_can_have_is_told(self, quick: Settings):
        with pytest.raises(SourceError, match="not the name of a host"):
            get(quick, f"https://{'a' * 64}.test/m.bin", sha256=sha256(BODY))

    def test_links_that_stay_inside_are_kept(self, quick: Settings, server: FileServer):
        body = tar_of(
            (member("a/link", tarfile.SYMTYPE, "../w.bin"), b""),
            (member("w.bin"), b"w"),
            (member("hard", tarfile.LNKTYPE, "w.bin"), b""),
        )
        folder = self.unpacked(quick, server, "m.tar", body)
        assert (folder / "a" / "link").read_bytes() == (folder / "hard").read_bytes() == b"w"
        zipped = zip_of(("w.bin", b"w", FILE), ("b/link", b"../w.bin", stat.S_IFLNK | 0o777))
        assert (self.unpacked(quick, server, "m.zip", zipped) / "b" / "link").read_bytes() == b"w"

    @pytest.mark.parametrize(
        ("name", "body", "says"),
        [
            ("m.tar", tar_of((member("../x"), b"x")), "not a name"),
            ("m.tar", tar_of((member("a/../../x"), b"x")), "not a name"),
            ("m.tar", tar_of((member("/tmp/x"), b"x")), "not a name"),
            ("m.zip", zip_of(("../x", b"x", FILE)), "not a name"),
            ("m.zip", zip_of(("/tmp/x", b"x", FILE)), "not a name"),
            ("m.tar", tar_of((member("x", tarfile.SYMTYPE, "/etc/passwd"), b"")), "leaves it"),
            ("m.tar", tar_of((member("a/x", tarfile.SYMTYPE, "../../x"), b"")), "leaves it"),
            ("m.tar", tar_of((member("x", tarfile.LNKTYPE, "../x"), b"")), "leaves it"),
            ("m.tar", tar_of((member("x", tarfile.LNKTYPE, "/etc/passwd"), b"")), "leaves it"),
            ("m.tar", tar_of((member("x", tarfile.SYMTYPE, "y"), b"")), "leads nowhere"),
            ("m.tar", tar_of((member("x", tarfile.SYMTYPE, "x"), b"")), "leads nowhere"),
            (
                "m.tar",
                tar_of(
                    (member("d/e/f", tarfile.DIRTYPE), b""),
                    (member("a", tarfile.SYMTYPE, "d/e/f"), b""),
                    (member("b", tarfile.SYMTYPE, "a/../../../.."), b""),
                ),
                "leaves it",
            ),
            (
                "m.tar",
                tar_of((member("a", tarfile.SYMTYPE, "."), b""), (member("a/b", tarfile.SYMTYPE, ".."), b"")),
                "leaves it",
            ),
            ("m.tar", tar_of((member("a", tarfile.SYMTYPE, ".."), b""), (member("a/b"), b"x")), "leaves it"),
            ("m.zip", zip_of(("x", b"/etc/passwd", stat.S_IFLNK | 0o777)), "leaves it"),
            ("m.tar", tar_of((member("x", tarfile.CHRTYPE), b"")), "a device or a pipe"),
            ("m.tar", tar_of((member("x", tarfile.FIFOTYPE), b"")), "a device or a pipe"),
            ("m.zip", zip_of(("x", b"", stat.S_IFIFO | 0o644)), "a device or a pipe"),
            ("m.tar", tar_of((member("x"), b"1"), (member("x"), b"2")), "twice"),
            ("m.tar", tar_of((member("x"), b"1"), (member("x/y"), b"2")), "x"),
            ("m.tar.gz", tar_of((member("x"), BODY), gz=True)[:-2000], "is damaged"),
            ("m.tar", b"no archive" * 100, "is damaged"),
            ("m.zip", b"no archive" * 100, "is damaged"),
            ("m.zip", zip_of(("x", BODY, FILE))[:-10], "is damaged"),
            ("m.tgz", tar_of(*[(member("x", tarfile.GNUTYPE_LONGNAME), b"x")] * 2000, gz=True), "is damaged"),
            ("m.tgz", tar_of(*[(member("x", tarfile.GNUTYPE_LONGNAME), bytes(2**20))] * 20, gz=True), "expands past"),
        ],
    )  # fmt: skip
    def test_a_bad_archive_is_refused_and_leaves_nothing(
        self, quick: Settings, server: FileServer, name: str, body: bytes, says: str
    ):
        with pytest.raises(SourceError, match=says):
            self.unpacked(quick, server, name, body)
        assert left_behind(quick.cache_dir) == []

    @pytest.mark.parametrize("name", ["m.tgz", "m.zip"])
    @pytest.mark.parametrize(
        ("bounds", "says"),
        [({"max_unpacked_bytes": 2**20}, "MAX_UNPACKED_BYTES"), ({"max_unpacked_ratio": 100.0}, "MAX_UNPACKED_RATIO")],
    )
    def test_an_archive_that_expands_too_far_is_refused(
        self, quick: Settings, server: FileServer, name: str, bounds: dict[str, float], says: str
    ):
        zeros = bytes(32 * 2**20)
        body = zip_of(("x", zeros, FILE)) if name == "m.zip" else tar_of((member("x"), zeros), gz=True)
        with pytest.raises(SourceError, match=says):
            self.unpacked(quick.model_copy(update=bounds), server, name, body)
        assert left_behind(quick.cache_dir) == []

    def test_a_header_that_would_fill_memory_is_refused(self, quick: Settings, server: FileServer):
        body = tar_of((member("x", tarfile.GNUTYPE_LONGNAME), bytes(64 * 2**20)), (member("y"), b""), gz=True)
        wide = quick.model_copy(update={"max_unpacked_ratio": 1e6})
        with pytest.raises(SourceError, match="header of"):
            self.unpacked(wide, server, "m.tgz", body)

    def test_too_many_files_are_refused(self, quick: Settings, server: FileServer, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("serve.sources.archive.MAX_FILES", 10)
        body = tar_of(*((member(f"{number}"), b"") for number in range(11)))
        with pytest.raises(SourceError, match="more than 10 files"):
            self.unpacked(quick, server, "m.tar", body)


paths = st.lists(st.sampled_from(["a", "b", "..", ".", "", "c"]), min_size=1, max_size=4).map("/".join)
kinds = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])


class TestArchiveProperties:
    @given(st.lists(st.tuples(paths | paths.map("/".__add__), kinds, paths), max_size=6))
    @hypothesis_settings(max_examples=100)
    def test_whatever_an_archive_holds_nothing_leads_out(self, members: list[tuple[str, bytes, str]]):
        with tempfile.TemporaryDirectory() as outer:
            self.unpack_all(Path(outer).resolve(), members)

    def unpack_all(self, outer: Path, members: list[tuple[str, bytes, str]]) -> None:
        folder = outer / "folder"
        folder.mkdir()
        (outer / "a").write_text("secret")
        archive = outer / "m.tar"
        archive.write_bytes(tar_of(*((member(name, kind, link), b"") for name, kind, link in members)))
        try:
            unpack(archive, folder, name=PurePosixPath("m.tar"), max_bytes=2**20, max_ratio=1e6)
        except SourceError:
            return
        finally:
            assert {path.name for path in outer.iterdir()} == {"a", "folder", "m.tar"}
            assert (outer / "a").stat().st_nlink == 1
        for path in folder.rglob("*"):
            assert path.resolve(strict=True).is_relative_to(folder)

    @pytest.mark.parametrize("through", [False, True])
    def test_links_that_lead_out_together_are_refused(self, tmp_path: Path, through: bool):
        # Each stays inside as it is written; `up` is the top, so that `out` is above it.
        members = [
            ("x/y/w", tarfile.REGTYPE, ""),
            ("x/y/up", tarfile.SYMTYPE, "../.."),
            ("x/y/out", tarfile.SYMTYPE, "up/.."),
        ]
        members += [("x/y/out/evil", tarfile.SYMTYPE, "w")] if through else []
        archive, folder = tmp_path / "m.tar", tmp_path / "folder"
        archive.write_bytes(tar_of(*((member(name, kind, link), b"") for name, kind, link in members)))
        folder.mkdir()
        with pytest.raises(SourceError, match="leaves it"):
            unpack(archive, folder, name=PurePosixPath("m.tar"), max_bytes=2**20, max_ratio=1e6)
        assert {path.name for path in tmp_path.iterdir()} == {"m.tar", "folder"}

    @given(st.data(), st.sampled_from(["m.tar", "m.tgz", "m.zip"]))
    @hypothesis_settings(max_examples=100)
    def test_a_damaged_archive_is_a_clear_error_or_none(self, data: st.DataObject, name: str):
        if name == "m.zip":
            body = bytearray(zip_of(("x", b"text" * 9, FILE), ("y", b"x", stat.S_IFLNK | 0o777)))
        else:
            body = bytearray(
                tar_of((member("x"), b"text" * 9), (member("y", tarfile.SYMTYPE, "x"), b""), gz=name == "m.tgz")
            )
        for position in data.draw(st.lists(st.integers(0, len(body) - 1), max_size=4)):
            body[position] = data.draw(st.integers(0, 255))
        with tempfile.TemporaryDirectory() as outer, contextlib.suppress(SourceError):
            (Path(outer) / "folder").mkdir()
            (Path(outer) / name).write_bytes(body)
            unpack(Path(outer, name), Path(outer, "folder"), name=PurePosixPath(name), max_bytes=2**20, max_ratio=1e6)


COMMIT, LATER = "c" * 40, "d" * 40
CONFIG = b'{"model_type": "bert"}'


def blob(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


class Hub:
    """A server that speaks the hub's API for one repository, and another that keeps its large files."""

    def __init__(self, server: FileServer, store: FileServer) -> None:
        self.server, self.store = server, store
        self.publish(COMMIT, {"config.json": CONFIG, "README.md": b"#"}, {"model.safetensors": BODY})

    def publish(self, commit: str, small: dict[str, bytes], large: dict[str, bytes], revision: str = "main") -> None:
        api, tree = "/api/models/org/repo", []
        info = {"id": "org/repo", "sha": commit, "siblings": [], "tags": [], "downloads": 0}
        self.server.answers[f"{api}/revision/{revision}"] = reply(info)
        for path, body in small.items():
            tree.append({"type": "file", "path": path, "size": len(body), "oid": blob(body)})
            headers = {"ETag": f'"{blob(body)}"', "X-Repo-Commit": commit}
            self.server.answers[f"/org/repo/resolve/{commit}/{path}"] = content(body, headers=headers)
        for path, body in large.items():
            pointer = {"oid": sha256(body), "size": len(body), "pointerSize": 134}
            tree.append({"type": "file", "path": path, "size": len(body), "oid": "e" * 40, "lfs": pointer})
            tree.append({"type": "directory", "path": "onnx", "size": 0, "oid": "f" * 40})
            there = f"{self.store.url}/{sha256(body)}"
            self.server.answers[f"/org/repo/resolve/{commit}/{path}"] = redirect(there)
            self.store.answers[f"/{sha256(body)}"] = content(body)
        self.server.answers[f"{api}/tree/{commit}"] = reply(tree)


def reply(value: object) -> Callable[..., None]:
    return status(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


class TestHub:
    @pytest.fixture
    def hub(self, trusted: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        with file_server() as server, file_server(server_context(trusted, "localhost")) as store:
            yield Hub(server, store)

    @pytest.fixture
    def near(self, quick: Settings, hub: Hub) -> Settings:
        """Settings of an operator who named the hub, and the store that it redirects to."""
        update = {"hf_endpoint": hub.server.url, "allowed_hosts": (f"localhost:{hub.store.port}",)}
        return quick.model_copy(update=update)

    def test_a_repository_arrives_verified_and_stays(self, near: Settings, hub: Hub):
        seen: list[tuple[int, int]] = []
        folder = get(near, "hf:org/repo", lambda *now: seen.append(now))
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
        assert (folder / "model.safetensors").read_bytes() == BODY
        assert seen[-1] == (len(BODY) + len(CONFIG), len(BODY) + len(CONFIG))
        hub.server.seen.clear()
        assert get(near, "hf:org/repo") == folder
        assert [one.path for one in hub.server.seen] == ["/api/models/org/repo/revision/main"]

    def test_the_token_goes_to_the_hub_alone(self, near: Settings, hub: Hub):
        get(near, "hf:org/repo")
        assert {one.headers.get("authorization") for one in hub.server.seen} == {"Bearer hf_secret"}
        assert hub.store.seen
        assert not any("hf_secret" in str(one.headers) for one in hub.store.seen)

    def test_a_moved_branch_is_another_folder_and_a_commit_stays(self, near: Settings, hub: Hub):
        first = get(near, "hf:org/repo")
        hub.publish(LATER, {"config.json": b"{}"}, {"model.safetensors": BODY[:999]})
        second = get(near, "hf:org/repo")
        assert (second / "model.safetensors").read_bytes() == BODY[:999]
        hub.server.answers.clear()
        assert get(near, "hf:org/repo", revision=COMMIT) == first

    def test_offline_takes_what_the_branch_last_was(self, near: Settings, hub: Hub):
        folder = get(near, "hf:org/repo")
        hub.server.seen.clear()
        offline = near.model_copy(update={"offline": True})
        assert get(offline, "hf:org/repo") == folder
        assert get(offline, "hf:org/repo", revision=COMMIT) == folder
        for source, revision in (("hf:org/repo", "v2"), ("hf:org/repo", LATER), ("hf:org/other", "main")):
            with pytest.raises(SourceError, match="offline is set"):
                get(offline, source, revision=revision)
        assert not hub.server.seen

    def test_a_hub_that_is_down_does_not_stop_a_cached_model(self, near: Settings, hub: Hub):
        folder = get(near, "hf:org/repo")
        hub.server.answers["/api/models/org/repo/revision/main"] = status(503)
        assert get(near, "hf:org/repo") == folder
        with pytest.raises(SourceError, match="gave up"):
            get(near, "hf:org/repo/config.json")

    def test_a_file_or_a_folder_of_it_may_be_named(self, near: Settings, hub: Hub):
        hub.publish(COMMIT, {"a/config.json": CONFIG, "a/x.md": b"#", "b/config.json": b"{}"}, {"a/m.gguf": BODY})
        file = get(near, "hf:org/repo/a/m.gguf")
        assert (file.name, file.read_bytes()) == ("m.gguf", BODY)
        folder = get(near, "hf:org/repo/a")
        assert {path.name for path in folder.iterdir()} == {"config.json", "m.gguf"}
        with pytest.raises(SourceError, match="has no 'c'; at its top are a, b"):
            get(near, "hf:org/repo/c")

    @pytest.mark.parametrize(
        ("names", "weights"),
        [
            (["m.safetensors", "pytorch_model.bin", "m.onnx"], {"m.safetensors"}),
            (["m.gguf", "pytorch_model.bin"], {"m.gguf"}),
            (["pytorch_model.bin", "tf.h5"], {"pytorch_model.bin", "tf.h5"}),
        ],
    )
    def test_pickles_come_only_where_there_is_nothing_else(
        self, near: Settings, hub: Hub, names: list[str], weights: set[str]
    ):
        hub.publish(COMMIT, {"config.json": CONFIG, "run.py": b"1"}, {name: name.encode() for name in names})
        assert {path.name for path in get(near, "hf:org/repo").iterdir()} == {"config.json", *weights}
        own = get(near, "hf:org/repo", task="python")
        assert {path.name for path in own.iterdir()} == {"config.json", "run.py", *names}

    def test_a_break_goes_on_where_it_was(self, near: Settings, hub: Hub):
        path = f"/{sha256(BODY)}"
        hub.store.once[path] = [content(BODY, cut_after=2**20)]
        assert (get(near, "hf:org/repo") / "model.safetensors").read_bytes() == BODY
        assert [one.headers.get("range") for one in hub.store.asked(path)] == [None, "bytes=1048576-"]

    def test_files_that_are_complete_are_not_asked_for_again(self, near: Settings, hub: Hub):
        config = f"/org/repo/resolve/{COMMIT}/config.json"

        def fail_after_config(handler) -> None:
            while not list(near.cache_dir.rglob("*.whole")):
                handler.wfile.flush()
            status(500)(handler)

        hub.store.answers[f"/{sha256(BODY)}"] = fail_after_config
        with pytest.raises(SourceError, match="gave up"):
            get(near, "hf:org/repo")
        hub.store.answers[f"/{sha256(BODY)}"] = content(BODY)
        assert (get(near, "hf:org/repo") / "config.json").read_bytes() == CONFIG
        assert len(hub.server.asked(config)) == 1

    @pytest.mark.parametrize("path", ["config.json", "model.safetensors"])
    def test_content_that_is_not_what_was_listed_is_refused(self, near: Settings, hub: Hub, path: str):
        wrong = (CONFIG if path == "config.json" else BODY)[::-1]
        hub.server.answers[f"/org/repo/resolve/{COMMIT}/{path}"] = content(wrong)
        with pytest.raises(SourceError, match="sent what has"):
            get(near, "hf:org/repo")
        assert not [folder for folder in near.cache_dir.rglob(f"{COMMIT}*") if folder.is_dir()]

    def test_a_store_that_the_operator_did_not_name_is_not_asked(self, near: Settings, hub: Hub):
        with pytest.raises(SourceError, match="redirects to another host"):
            get(near.model_copy(update={"allowed_hosts": ()}), "hf:org/repo")
        assert not hub.store.seen

    @pytest.mark.parametrize(
        "name", ["../../evil.json", "/evil.json", "a//b.json", "\ud800.json", "a\n.json", "a\\b.json"]
    )
    def test_a_name_that_leads_out_or_is_none_is_refused(self, near: Settings, hub: Hub, name: str):
        hub.publish(COMMIT, {name: CONFIG}, {})
        with pytest.raises(SourceError, match="not a name"):
            get(near, "hf:org/repo")
        assert left_behind(near.cache_dir) == []

    @pytest.mark.parametrize(
        ("code", "says", "fix"),
        [(404, "RepoNotFound", "is the name right"), (404, "RevisionNotFound", "no revision 'main'"),
         (403, "GatedRepo", "HF_TOKEN"), (401, "", "is HF_TOKEN right")],
    )  # fmt: skip
    def test_what_the_hub_refuses_says_what_to_do(self, near: Settings, hub: Hub, code: int, says: str, fix: str):
        refusal = status(code, {"X-Error-Code": says, "X-Error-Message": "no"})
        hub.server.answers["/api/models/org/repo/revision/main"] = refusal
        with pytest.raises(SourceError, match=fix):
            get(near, "hf:org/repo")

    def test_partial_files_of_a_superseded_commit_go(self, near: Settings, hub: Hub):
        hub.store.answers[f"/{sha256(BODY)}"] = content(BODY, cut_after=1000)
        with pytest.raises(SourceError, match="gave up"):
            get(near, "hf:org/repo")
        assert left_behind(near.cache_dir)
        hub.publish(LATER, {"config.json": b"{}"}, {"model.safetensors": BODY[:999]})
        folder = get(near, "hf:org/repo")
        kept = {path for path in left_behind(near.cache_dir) if not path.name.startswith("at-")}
        assert kept == {folder / "config.json", folder / "model.safetensors"}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running.get_host_and_port()[1]
    running.stop()


class TestS3:
    @pytest.fixture
    def client(self, port: int, monkeypatch: pytest.MonkeyPatch):
        import boto3

        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        client.create_bucket(Bucket="bucket")
        yield client
        for one in client.list_objects_v2(Bucket="bucket").get("Contents", []):
            client.delete_object(Bucket="bucket", Key=one["Key"])
        client.close()

    @pytest.fixture
    def near(self, quick: Settings, port: int) -> Settings:
        return quick.model_copy(update={"s3_endpoint": f"http://127.0.0.1:{port}"})

    def put(self, client, **bodies: bytes) -> None:
        for key, body in bodies.items():
            client.put_object(Bucket="bucket", Key=key.replace("__", "/"), Body=body)

    def test_a_prefix_arrives_and_its_neighbours_do_not(self, near: Settings, client):
        self.put(client, m__config=CONFIG, m__sub__w=BODY, m__=b"", m2__x=b"x", m__empty=b"")
        seen: list[tuple[int, int]] = []
        folder = get(near, "s3://bucket/m", lambda *now: seen.append(now))
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert files == {"config": CONFIG, "sub/w": BODY, "empty": b""}
        assert seen[-1] == (len(BODY) + len(CONFIG), len(BODY) + len(CONFIG))
        assert get(near, "s3://bucket/m/") == folder
        assert get(near, "s3://bucket/m/sub/w").read_bytes() == BODY

    def test_a_listing_of_many_pages_is_whole(self, near: Settings, client, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
        self.put(client, **{f"m__{number}": b"%d" % number for number in range(10)})
        assert client.list_objects_v2(Bucket="bucket")["IsTruncated"]
        assert sorted(int(path.read_text()) for path in get(near, "s3://bucket/m").iterdir()) == list(range(10))

    def test_a_changed_prefix_is_another_folder(self, near: Settings, client):
        self.put(client, m__config=CONFIG)
        first = get(near, "s3://bucket/m")
        self.put(client, m__config=b"{}")
        second = get(near, "s3://bucket/m")
        assert (first / "config").read_bytes() == CONFIG
        assert (second / "config").read_bytes() == b"{}"
        assert get(near.model_copy(update={"offline": True}), "s3://bucket/m") == second

    def test_an_object_stored_in_parts_arrives(self, near: Settings, client):
        upload = client.create_multipart_upload(Bucket="bucket", Key="m/w")["UploadId"]
        parts = []
        for number, body in enumerate((bytes(5 * 2**20), BODY), start=1):
            part = client.upload_part(Bucket="bucket", Key="m/w", UploadId=upload, PartNumber=number, Body=body)
            parts.append({"PartNumber": number, "ETag": part["ETag"]})
        client.complete_multipart_upload(Bucket="bucket", Key="m/w", UploadId=upload, MultipartUpload={"Parts": parts})
        assert (get(near, "s3://bucket/m") / "w").read_bytes() == bytes(5 * 2**20) + BODY

    def test_a_break_goes_on_where_it_was(self, near: Settings, client, port: int):
        body = BODY * 4
        self.put(client, m__w=body)
        line = Line(port)
        broken = near.model_copy(update={"s3_endpoint": f"http://127.0.0.1:{line.port}"})
        line.allow(10 * 2**20)
        with pytest.raises(SourceError, match="gave up after 3 tries"):
            get(broken, "s3://bucket/m")
        assert not list(near.cache_dir.rglob("w"))
        line.allow(None)
        assert (get(broken, "s3://bucket/m") / "w").read_bytes() == body
        starts = [int(start) for start in re.findall(rb"[Rr]ange: bytes=(\d+)-", line.sent)]
        assert starts == [8 * 2**20]
        line.close()

    def test_one_that_is_killed_is_gone_on_with(self, near: Settings, client, port: int):
        body = BODY * 4
        self.put(client, m__w=body)
        line = Line(port)
        there = near.model_copy(update={"s3_endpoint": f"http://127.0.0.1:{line.port}", "download_timeout_s": 60.0})
        killed = fetch_elsewhere(there, spec("s3://bucket/m"))
        while sum(path.stat().st_size for path in left_behind(near.cache_dir)) < 2**23:
            assert killed.poll() is None
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=60)
        assert (get(there, "s3://bucket/m") / "w").read_bytes() == body
        line.close()

    def test_a_store_that_is_down_does_not_stop_a_cached_model(self, near: Settings, client, port: int):
        self.put(client, m__config=CONFIG)
        line = Line(port)
        there = near.model_copy(update={"s3_endpoint": f"http://127.0.0.1:{line.port}"})
        folder = get(there, "s3://bucket/m")
        line.allow(0)
        assert get(there, "s3://bucket/m") == folder
        with pytest.raises(SourceError, match="cannot be reached"):
            get(there, "s3://bucket/other")
        line.close()

    @pytest.mark.parametrize("source", ["s3://bucket/absent", "s3://absent/m"])
    def test_what_is_not_there_says_so(self, near: Settings, client, source: str):
        with pytest.raises(SourceError, match="nothing is there"):
            get(near, source)

    def test_offline_and_not_cached_is_an_error(self, near: Settings, client):
        self.put(client, m__config=CONFIG)
        with pytest.raises(SourceError, match="offline is set"):
            get(near.model_copy(update={"offline": True}), "s3://bucket/m")

    def test_a_key_that_leads_out_or_is_file_and_folder_is_refused(self, near: Settings, client):
        client.put_object(Bucket="bucket", Key="bad/a/../../../evil", Body=b"x")
        self.put(client, both__a=b"x", both__a__b=b"x")
        with pytest.raises(SourceError, match="not a name"):
            get(near, "s3://bucket/bad")
        with pytest.raises(SourceError, match="both as a file and as a folder"):
            get(near, "s3://bucket/both")
        assert left_behind(near.cache_dir) == []

    def test_content_that_is_not_what_was_listed_is_refused(self, quick: Settings, client):
        with file_server() as liar:
            liar.answers["/bucket"] = status(
                200,
                {"Content-Type": "application/xml"},
                f"""<ListBucketResult><Name>bucket</Name><KeyCount>1</KeyCount><IsTruncated>false</IsTruncated><Contents>
                <Key>m/w</Key><Size>{len(BODY)}</Size><ETag>"{hashlib.md5(BODY).hexdigest()}"</ETag>
                <LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents></ListBucketResult>""".encode(),
            )
            liar.answers["/bucket/m/w"] = content(BODY[::-1])
            with pytest.raises(SourceError, match="not what was stored"):
                get(quick.model_copy(update={"s3_endpoint": liar.url}), "s3://bucket/m")
            assert left_behind(quick.cache_dir) == []

    def test_without_its_extra_it_says_what_to_install(self, quick: Settings, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "s3fs", None)
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        with pytest.raises(SourceError, match=re.escape("pip install 'roundhouse-serve[s3]'")):
            get(quick, "s3://bucket/m")
        with pytest.raises(SourceError, match=re.escape("pip install 'roundhouse-serve[gcs]'")):
            get(quick, "gs://bucket/m")


class TestGoogle:
    @pytest.fixture
    def store(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        with file_server() as running:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
            items = [
                {
                    "kind": "storage#object",
                    "name": name,
                    "bucket": "bucket",
                    "size": str(len(body)),
                    "etag": f"of-{name}",
                    "generation": "7",
                    "md5Hash": base64.b64encode(hashlib.md5(body).digest()).decode(),
                }
                for name, body in (("m/config.json", CONFIG), ("m/sub/w", BODY * 4))
            ]
            running.answers["/storage/v1/b/bucket/o"] = reply({"kind": "storage#objects", "items": items})
            running.answers["/download/storage/v1/b/bucket/o/m%2Fconfig.json"] = content(CONFIG)
            running.answers["/download/storage/v1/b/bucket/o/m%2Fsub%2Fw"] = content(BODY * 4)
            yield running

    def test_a_prefix_arrives_and_stays(self, quick: Settings, store: FileServer):
        folder = get(quick, "gs://bucket/m")
        assert (folder / "sub" / "w").read_bytes() == BODY * 4
        assert get(quick.model_copy(update={"offline": True}), "gs://bucket/m") == folder

    def test_a_break_goes_on_where_it_was(self, quick: Settings, store: FileServer):
        path = "/download/storage/v1/b/bucket/o/m%2Fsub%2Fw"
        store.once[path] = [content(BODY * 4), content(BODY * 4, cut_after=1000)]
        assert (get(quick, "gs://bucket/m") / "sub" / "w").read_bytes() == BODY * 4
        assert [one.headers["range"].partition("-")[0] for one in store.asked(path)] == [
            "bytes=0",
            "bytes=8388608",
            "bytes=8388608",
        ]

    def test_content_that_is_not_what_was_listed_is_refused(self, quick: Settings, store: FileServer):
        store.answers["/download/storage/v1/b/bucket/o/m%2Fsub%2Fw"] = content((BODY * 4)[::-1])
        with pytest.raises(SourceError, match="not what was stored"):
            get(quick, "gs://bucket/m")
