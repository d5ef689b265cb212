"""The `roundhouse` command: the only place where things are wired together, importing only what it runs."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve import __version__
from serve.errors import RoundhouseError

if TYPE_CHECKING:
    from serve.cluster.plan import Worker
    from serve.declaration import Declaration
    from serve.runtime.state import Running
    from serve.settings import Settings

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
_CLUSTER_OPTIONS = ("--context", "--namespace")


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand.

    Args:
        name: What is typed.
        takes: Its arguments as the overview shows them.
        summary: One line for the overview.
        arguments: Adds its arguments to a parser.
        run: Does it and returns the exit status; imports what it needs itself, so that `--help` stays quick.
    """

    name: str
    takes: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", default="models.yaml", metavar="FILE", help="default: models.yaml")
    parser.add_argument(
        "--json", action="store_true", help="print the problems as a JSON list, empty if there are none"
    )


def _check(options: argparse.Namespace) -> int:
    from serve.declaration import InvalidDeclaration, load_declaration

    try:
        declaration = load_declaration(options.file)
    except InvalidDeclaration as error:
        if options.json:
            _print_json([problem.as_dict() for problem in error.problems])
        else:
            count = len(error.problems)
            print(error, f"{options.file}: {count} problem{'s' if count > 1 else ''}", sep="\n")
        return FAILED
    if options.json:
        _print_json([])
    else:
        print(_overview(declaration))
    return OK


def _overview(declaration: Declaration) -> str:
    """Return a short table of what is declared."""
    from serve.spec import revision_of

    rows = [("MODEL", "TASK", "SOURCE", "REPLICAS", "DEVICE", "REVISION")]
    for spec in declaration.models:
        low, high = spec.scaling.min_replicas, spec.scaling.max_replicas
        replicas = str(low) if low == high else f"{low} to {high}"
        source = spec.source if len(spec.source) <= 48 else f"{spec.source[:45]}..."
        rows.append((spec.name, spec.task, source, replicas, spec.device, revision_of(spec)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    count = len(declaration.models)
    summary = f"{declaration.path}: {count} model{'' if count == 1 else 's'}, no problem"
    return "\n".join([*lines, summary] if count else [summary])


def _schema_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/models-yaml.md instead")


def _schema(options: argparse.Namespace) -> int:
    from serve.schema import json_schema, markdown_tables

    if options.markdown:
        print(markdown_tables(), end="")
    else:
        _print_json(json_schema())
    return OK


def _platform_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, metavar="N", help="port of the platform (default: ROUNDHOUSE_PORT or 8000)")


def _settings(options: argparse.Namespace) -> Settings:
    """Return the environment's settings with what the command line says in their place."""
    from serve.settings import Settings

    changed = {name: getattr(options, name, None) for name in ("port", "host")}
    return Settings.from_environment().replaced(**{name: value for name, value in changed.items() if value is not None})


def _up_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", default="models.yaml", metavar="FILE", help="default: models.yaml")
    _platform_arguments(parser)
    parser.add_argument("--host", metavar="ADDRESS", help="address to serve on (default: ROUNDHOUSE_HOST or 127.0.0.1)")
    parser.add_argument("--dashboard", action="store_true", help="also start Ray's dashboard, on localhost:8265 only")


def _up(options: argparse.Namespace) -> int:
    from pathlib import Path

    from serve.runtime.up import up

    return up(Path(options.file), settings=_settings(options), dashboard=options.dashboard)


def _running(options: argparse.Namespace) -> tuple[Settings, Running]:
    """Return the platform that runs on the port.

    Raises:
        RoundhouseError: None does.
    """
    from serve.runtime import state

    settings = _settings(options)
    running = state.read(settings, settings.port)
    if running is None:
        raise RoundhouseError(
            f"nothing was started by `roundhouse up` on port {settings.port}; name another with --port"
        )
    return settings, running


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    _platform_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the models' state as JSON")
    _remote_arguments(parser)


def _remote_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", metavar="NAME", help="ask a cluster: of the kubeconfig, '' for its current one")
    parser.add_argument("--namespace", metavar="NAME", help="with --context; default: the context's")


def _asks_cluster(options: argparse.Namespace) -> bool:
    """Tell whether a cluster is asked rather than this machine's platform.

    Raises:
        RoundhouseError: It is not, and a namespace is given, which only a cluster has.
    """
    if options.context is None and options.namespace is not None:
        raise RoundhouseError("--namespace is a cluster's; give --context too, '' for the kubeconfig's current one")
    return options.context is not None


def _ask(options: argparse.Namespace, ask: Callable[[str], int], *, here: Callable[[], str]) -> int:
    """Ask the platform of a cluster or of this machine.

    Args:
        ask: Asks at a URL and returns the exit status.
        here: Returns the URL of this machine's.
    """
    if _asks_cluster(options):
        from serve.cluster.remote import forwarded

        with forwarded(options.context, options.namespace) as url:
            return ask(url)
    return ask(here())


def _status(options: argparse.Namespace) -> int:
    if _asks_cluster(options):
        return _cluster_status(options)
    from serve.runtime.status import fetch_status, render_status

    _, running = _running(options)
    models = fetch_status(running.url)
    if options.json:
        _print_json({"url": running.url, "pid": running.pid, "file": running.file, "models": models})
    else:
        render_status(running, models)
    return OK if all(model["phase"] == "ready" for model in models) else FAILED


def _cluster_status(options: argparse.Namespace) -> int:
    from serve.cluster.remote import all_ready, fetch_models, told

    namespace, models = fetch_models(options.context, options.namespace)
    if options.json:
        _print_json({"namespace": namespace, "models": models})
    else:
        print(told(models) if models else f"namespace {namespace} has no models")
    return OK if all_ready(models) else FAILED


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="its name in the declaration")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="text, @FILE, or numbers such as 1,2,3; one row each"
    )
    _platform_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the whole answer as the protocol has it")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer of a chat model")
    _remote_arguments(parser)


def _predict(options: argparse.Namespace) -> int:
    from serve.runtime import state
    from serve.runtime.predict import answer

    def ask(url: str) -> int:
        return answer(url, options.model, options.inputs, as_json=options.json, max_tokens=options.max_tokens)

    def here() -> str:
        settings = _settings(options)
        running = state.read(settings, settings.port)
        return running.url if running else settings.url

    return _ask(options, ask, here=here)


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="its name in the declaration")
    parser.add_argument(
        "--at",
        metavar="TIME",
        help="what was decided then, or last before: 14:05[:30] of today, or 2026-01-31T14:05:30Z",
    )
    _platform_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the whole answer, or with --at the decision")
    _remote_arguments(parser)


def _explain(options: argparse.Namespace) -> int:
    from serve.runtime.explain import explain, read_time

    at = read_time(options.at) if options.at is not None else None

    def ask(url: str) -> int:
        explain(url, options.model, at=at, as_json=options.json)
        return OK

    return _ask(options, ask, here=lambda: _running(options)[1].url)


def _top_arguments(parser: argparse.ArgumentParser) -> None:
    _platform_arguments(parser)
    parser.add_argument("--once", action="store_true", help="look for two seconds, print, and end")
    parser.add_argument("--json", action="store_true", help="print a JSON list of the models, one a line")


def _top(options: argparse.Namespace) -> int:
    from serve.runtime.top import top

    top(_running(options)[1].url, once=options.once, as_json=options.json)
    return OK


def _trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request", metavar="REQUEST_ID", help="the x-request-id that it was sent with")
    parser.add_argument("--json", action="store_true", help="print its spans as JSON")
    _platform_arguments(parser)
    _remote_arguments(parser)


def _trace(options: argparse.Namespace) -> int:
    from serve.runtime.trace import fetch_request, render_request

    def show(url: str) -> int:
        told = fetch_request(url, options.request)
        if options.json:
            _print_json(told)
        else:
            render_request(told)
        return OK

    return _ask(options, show, here=lambda: _running(options)[1].url)


def _logs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="its name")
    parser.add_argument("--context", default="", metavar="NAME", help="of the kubeconfig; default: its current one")
    parser.add_argument("--namespace", metavar="NAME", help="default: the context's")
    parser.add_argument("--lines", type=int, default=1000, metavar="N", help="of each pod's log; default: 1000")
    parser.add_argument("--follow", action="store_true", help="go on with what comes, until Ctrl-C")


def _logs(options: argparse.Namespace) -> int:
    from serve.cluster.remote import logs_of
    from serve.settings import Settings
    from serve.telemetry.lines import renderer

    def say(line: str) -> None:
        print(f"roundhouse: {line}", file=sys.stderr, flush=True)

    settings = Settings.from_environment()
    render = renderer(settings.log_format, is_terminal=sys.stdout.isatty(), colour=Settings.wants_colour())
    place = options.context, options.namespace
    for line in logs_of(options.model, *place, lines=options.lines, follow=options.follow, say=say, render=render):
        print(line, flush=True)
    return OK


def _follow_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", metavar="FOLDER", help="of Ray's logs; default: of the session that runs")


def _follow_logs(options: argparse.Namespace) -> int:
    from pathlib import Path

    from serve.runtime.logs import FOLDER, follow
    from serve.settings import Settings
    from serve.telemetry.lines import form_of

    def write(line: str) -> None:
        print(line, flush=True)

    log_format = form_of(Settings.from_environment().log_format, is_terminal=sys.stdout.isatty())
    follow(Path(options.folder) if options.folder else FOLDER, log_format=log_format, write=write)
    return OK


def _metrics_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=6386, metavar="N", help="default: %(default)s")


def _metrics(options: argparse.Namespace) -> int:
    from serve.runtime import nvml
    from serve.settings import Settings
    from serve.telemetry.devices import Gpus
    from serve.telemetry.endpoint import serve_node

    folder = Settings.from_environment().metrics_dir
    if folder is None:
        raise RoundhouseError("ROUNDHOUSE_METRICS_DIR is not set; it names the folder of this node's metrics")
    serve_node(folder, port=options.port, devices=Gpus(nvml.binding).read)
    return OK


def _rules_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runbooks",
        default="docs/runbooks",
        metavar="URL",
        help="where alerts say the runbooks are; default: %(default)s",
    )


def _rules(options: argparse.Namespace) -> int:
    from serve.telemetry.rules import rules_yaml

    print(rules_yaml(runbooks=options.runbooks), end="")
    return OK


def _down(options: argparse.Namespace) -> int:
    from serve.runtime import state

    _, running = _running(options)
    print(f"stopping {running.url} (process {running.pid}), which finishes what is in flight", flush=True)
    state.stop(running)
    print("stopped")
    return OK


def _drain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head", required=True, type=_host_and_port, metavar="HOST:PORT", help="Ray's control store")
    parser.add_argument("--node-ip", required=True, metavar="IP", help="this node's address, as given to `ray start`")
    parser.add_argument("--deadline-s", type=float, default=60.0, metavar="S", help="default: 60")


def _host_and_port(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} has no port; give it as HOST:PORT, such as head:6379")
    return text


def _drain(options: argparse.Namespace) -> int:
    from serve.runtime.drain import drain_node

    def say(line: str) -> None:
        print(line, flush=True)

    drain_node(options.head, address=options.node_ip, deadline_s=options.deadline_s, say=say)
    return OK


def _cluster_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context", metavar="NAME", help="of the kubeconfig, '' for its current one; default: the pod's"
    )


def _controller_arguments(parser: argparse.ArgumentParser) -> None:
    _cluster_arguments(parser)
    parser.add_argument("--namespace", required=True, metavar="NAME", help="whose Models it looks after")
    parser.add_argument("--rayservice", default="", metavar="NAME", help="the RayService to write, with KubeRay")
    parser.add_argument("--ray-url", default="", metavar="URL", help="Ray's head, http://host:8265")
    parser.add_argument("--ray-token-file", required=True, metavar="FILE", help="the Ray cluster's token")
    parser.add_argument("--gateway-url", required=True, metavar="URL", help="where the gateway answers in the cluster")
    parser.add_argument("--public-url", required=True, metavar="URL", help="where callers reach it, for status.url")
    parser.add_argument("--gateway-replicas", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--lease", default="roundhouse-controller", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--identity", required=True, metavar="NAME", help="of this process, such as its pod's name")
    parser.add_argument("--health-port", type=int, default=8081, metavar="N", help="default: 8081")


def _controller(options: argparse.Namespace) -> int:
    from pathlib import Path

    from serve.cluster.commands import ControllerOptions, run_controller

    if bool(options.rayservice) == bool(options.ray_url):
        raise RoundhouseError("a controller takes either --rayservice or --ray-url")
    told = {name: getattr(options, name) for name in ControllerOptions.__dataclass_fields__}
    run_controller(ControllerOptions(**told | {"ray_token_file": Path(options.ray_token_file)}))
    return OK


def _install_crd(options: argparse.Namespace) -> int:
    from serve.cluster.commands import install_crd

    install_crd(context=options.context)
    print("the Model resource is installed")
    return OK


def _remove_arguments(parser: argparse.ArgumentParser) -> None:
    _cluster_arguments(parser)
    parser.add_argument("--namespace", required=True, metavar="NAME", help="whose Models are deleted")
    parser.add_argument("--remove-crd", action="store_true", help="the Model resource as well, if no Model is left")
    parser.add_argument("--timeout-s", type=float, default=240.0, metavar="S", help="default: 240")


def _remove_models(options: argparse.Namespace) -> int:
    from serve.cluster.commands import remove_models

    def say(line: str) -> None:
        print(line, flush=True)

    gone = remove_models(
        options.namespace,
        context=options.context,
        with_definition=options.remove_crd,
        timeout_s=options.timeout_s,
        say=say,
    )
    return OK if gone else FAILED


def _render_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--file", default="models.yaml", metavar="FILE", help="default: models.yaml")
    parser.add_argument("--namespace", metavar="NAME", help="of the Models; default: none, for kubectl to say")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of YAML")


def _render(options: argparse.Namespace) -> int:
    from pathlib import Path

    from serve.cluster.render import as_yaml, manifests, read_models

    objects = manifests(read_models(Path(options.file))[1], namespace=options.namespace)
    if options.json:
        _print_json(objects)
    else:
        print(as_yaml(objects), end="")
    return OK


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--file", default="models.yaml", metavar="FILE", help="default: models.yaml")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--values", metavar="FILE", help="the chart's values, with ray.workerGroups")
    where.add_argument("--nodes", metavar="FILE", help="what `kubectl get nodes -o json` (or yaml) printed")
    where.add_argument("--context", metavar="NAME", help="ask a cluster: of the kubeconfig, '' for its current one")
    parser.add_argument("--json", action="store_true", help="print the forecast as JSON")


def _plan(options: argparse.Namespace) -> int:
    from dataclasses import asdict
    from pathlib import Path

    from serve.cluster.plan import forecast, told
    from serve.cluster.render import read_models

    found = forecast(read_models(Path(options.file))[0], _workers(options))
    if options.json:
        _print_json(asdict(found))
    else:
        print(told(found))
    return FAILED if found.unplaced else OK


def _workers(options: argparse.Namespace) -> list[Worker]:
    from pathlib import Path

    import yaml

    from serve.cluster.plan import workers_of_nodes, workers_of_values

    if options.context is not None:
        from serve.cluster.remote import fetch_nodes

        return workers_of_nodes(fetch_nodes(options.context))
    path = options.values or options.nodes
    try:
        document = yaml.safe_load(Path(path).read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise RoundhouseError(f"{path}: cannot be read: {error}") from error
    return workers_of_values(document) if options.values else workers_of_nodes(document)


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", required=True, metavar="URL", help="where the platform answers")
    parser.add_argument("--timeout-s", type=float, default=300.0, metavar="S", help="for its start; default: 300")


def _verify(options: argparse.Namespace) -> int:
    from serve.cluster.verify import verify

    def say(line: str) -> None:
        print(line, flush=True)

    return OK if verify(options.url, timeout_s=options.timeout_s, say=say) else FAILED


def _dashboards_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["export"], metavar="export", help="write them as files")
    parser.add_argument("folder", metavar="FOLDER", help="where to; made if it is absent")
    parser.add_argument("--json", action="store_true", help="print the files as a JSON list")


def _dashboards(options: argparse.Namespace) -> int:
    from pathlib import Path

    from serve.telemetry.dashboards import export

    written = export(Path(options.folder))
    if options.json:
        _print_json([{"file": str(path), "uid": one.uid, "title": one.title} for path, one in written])
    else:
        print(*(f"{path}  {one.title}" for path, one in written), sep="\n")
    return OK


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2))


COMMANDS = (
    Command("up", "[FILE]", "Serve the models of a declaration, and follow its edits", _up_arguments, _up),
    Command("status", "", "Show the models of the running platform", _status_arguments, _status),
    Command("top", "", "Watch what the models do: requests, times, replicas", _top_arguments, _top),
    Command("explain", "MODEL", "Tell why a model has as many replicas as it has", _explain_arguments, _explain),
    Command("predict", "MODEL INPUT...", "Ask a model, from the command line", _predict_arguments, _predict),
    Command("trace", "REQUEST_ID", "Show where the time of a request went", _trace_arguments, _trace),
    Command("down", "", "Drain and stop the running platform", _platform_arguments, _down),
    Command("check", "[FILE]", "Tell every problem in a declaration, or what it declares", _check_arguments, _check),
    Command("schema", "", "Print the JSON Schema of models.yaml, which editors use", _schema_arguments, _schema),
    Command("render", "-f FILE", "Print a declaration's Model manifests, for kubectl", _render_arguments, _render),
    Command("logs", "MODEL", "Print what a model's replicas on a cluster print and log", _logs_arguments, _logs),
    Command("plan", "-f FILE", "Forecast where a cluster would put each replica", _plan_arguments, _plan),
    Command("rules", "", "Print what Prometheus records and alerts on", _rules_arguments, _rules),
    Command("dashboards", "export FOLDER", "Write the dashboards for Grafana", _dashboards_arguments, _dashboards),
)

#: What the chart's pods run.
CLUSTER_COMMANDS = (
    Command(
        "controller", "", "Make a Ray cluster serve what a namespace's Models say", _controller_arguments, _controller
    ),
    Command("drain-node", "", "Move the replicas of this Ray node elsewhere before it ends", _drain_arguments, _drain),
    Command("follow-logs", "", "Print what this node's replicas print and log", _follow_arguments, _follow_logs),
    Command("metrics", "", "Answer scrapes of this node's metrics", _metrics_arguments, _metrics),
    Command("install-crd", "", "Apply the definition of the Model resource", _cluster_arguments, _install_crd),
    Command("verify", "", "Send every model of a platform a real request", _verify_arguments, _verify),
    Command("remove-models", "", "Delete a namespace's Models and wait for them", _remove_arguments, _remove_models),
)


class _Parser(argparse.ArgumentParser):
    """A parser whose help is one page about all the commands."""

    def format_help(self) -> str:
        width = max(len(f"{command.name} {command.takes}") for command in COMMANDS) + 2

        def listed(commands: Sequence[Command]) -> list[str]:
            return [f"  roundhouse {f'{c.name} {c.takes}':<{width}}{c.summary}" for c in commands]

        return "\n".join(
            [
                "Roundhouse serves many models on few GPUs, from one declaration.",
                "",
                *listed(COMMANDS),
                *textwrap.wrap(
                    f"  A cluster's pods run {', '.join(each.name for each in CLUSTER_COMMANDS)}.",
                    100,
                    break_on_hyphens=False,
                    subsequent_indent="  ",
                ),
                "",
                f"  roundhouse {'COMMAND --help':<{width}}What one command takes",
                f"  roundhouse {'--context NAME':<{width}}Before or after a command, ask a cluster of the kubeconfig",
                f"  roundhouse {'--version':<{width}}Print the version",
                "",
                "docs/models-yaml.md describes a declaration; settings are ROUNDHOUSE_* variables.",
                "",
            ]
        )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="roundhouse", usage="roundhouse COMMAND ...", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"roundhouse {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=argparse.ArgumentParser
    )
    for command in (*COMMANDS, *CLUSTER_COMMANDS):
        subparser = commands.add_parser(
            command.name, prog=f"roundhouse {command.name}", description=f"{command.summary}.", allow_abbrev=False
        )
        command.arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _command_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with what names a cluster after the command, whose own parser knows it."""
    place = 0
    while place < len(arguments) and arguments[place].partition("=")[0] in _CLUSTER_OPTIONS:
        place += 1 if "=" in arguments[place] else 2
    return [*arguments[place : place + 1], *arguments[:place], *arguments[place + 1 :]]


def _misspelt(arguments: Sequence[str]) -> str | None:
    """Return a sentence about a first argument that is no command, or None."""
    names = [command.name for command in (*COMMANDS, *CLUSTER_COMMANDS)]
    option = arguments[0].partition("=")[0]
    if option in _CLUSTER_OPTIONS:
        return f"no command beside {option}; such as roundhouse {option} NAME status"
    if arguments[0].startswith("-") or arguments[0] in names:
        return None
    import difflib

    near = difflib.get_close_matches(arguments[0], names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return f"no command {arguments[0]!r}; {hint}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Args:
        arguments: What follows `roundhouse`; None takes those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    if not arguments:
        parser.print_help()
        return USAGE
    arguments = _command_first(arguments)
    if misspelt := _misspelt(arguments):
        parser.error(misspelt)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except RoundhouseError as error:
        print(f"roundhouse: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # The reader left; what Python would still flush at exit has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
