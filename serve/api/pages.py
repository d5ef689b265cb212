"""The documentation as pages of HTML that load nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from serve.api.directory import ModelStatus
from serve.api.documents import Document, curl, shortened

_STYLE = """
:root{color-scheme:light dark;--ink:#1d232b;--soft:#5d6875;--line:#d9dee4;--paper:#fff;--well:#f4f6f8;--accent:#9a3b12;
--ok:#1b7f4b;--wait:#9a6700;--bad:#b42318}
@media(prefers-color-scheme:dark){:root{--ink:#e7ebef;--soft:#9aa5b1;--line:#313a44;--paper:#14181d;--well:#1d232a;
--accent:#f0935f;--ok:#4cc38a;--wait:#e2b340;--bad:#ff8a7a}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;margin:0 0 .25rem;letter-spacing:-.01em}h2{font-size:1.2rem;margin:2.25rem 0 .5rem}
a{color:var(--accent)}p.lead{color:var(--soft);margin:.25rem 0 1.5rem}
article{border:1px solid var(--line);border-radius:.6rem;padding:1rem 1.15rem;margin:0 0 1rem}
article h2,article h3{margin:0;font-size:1.1rem}
article p{margin:.4rem 0}
pre{background:var(--well);border-radius:.45rem;padding:.75rem .9rem;overflow:auto;margin:.6rem 0;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
background:var(--well);border-radius:.25rem;padding:.1em .3em}
.method{display:inline-block;
min-width:3.4rem;text-align:center;font:600 12px/1.8 ui-monospace,monospace;border-radius:.3rem;
color:var(--paper);background:var(--soft);margin-right:.5rem}.method.post{background:var(--accent)}
.state{font-size:.82rem;font-weight:600;margin-left:.5rem;color:var(--wait)}
.state.ready{color:var(--ok)}.state.failed{color:var(--bad)}
.soft{color:var(--soft);font-size:.9rem}summary{cursor:pointer;color:var(--soft)}
table{border-collapse:collapse;width:100%;font-size:.92rem}td,th{text-align:left;padding:.35rem .6rem .35rem 0;
border-bottom:1px solid var(--line);vertical-align:top}
""".strip()


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>{body}</main></body></html>"
    )


def model_page(document: Document) -> str:
    """Return the page of one model's OpenAPI document."""
    info, base = document["info"], document["servers"][0]["url"]
    parts = [
        f'<h1>{escape(info["title"])}</h1><p class="lead">revision {escape(str(info["version"]))} · '
        f'<a href="{base}/openapi.json">openapi.json</a> · <a href="/docs">every model</a></p>',
        _prose(info["description"]),
        "<h2>Requests</h2>",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(_operation(base + path.rstrip("/"), method, operation))
    return _page(f"{info['title']} · Roundhouse", "".join(parts))


def _prose(text: str) -> str:
    """Return paragraphs and lists of a description; `code` is kept."""
    blocks, items = [], []
    for line in [*text.split("\n"), ""]:
        if line.startswith("- "):
            items.append(f"<li>{_inline(line[2:])}</li>")
            continue
        if items:
            blocks.append(f"<ul>{''.join(items)}</ul>")
            items = []
        if line:
            blocks.append(f"<p>{_inline(line)}</p>")
    return "".join(blocks)


def _inline(text: str) -> str:
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))


def _operation(path: str, method: str, operation: Document) -> str:
    parts = [
        f'<article><h3><span class="method {method}">{method.upper()}</span><code>{escape(path)}</code></h3>',
        f"<p>{_inline(operation['summary'])}. {_inline(operation.get('description', ''))}</p>",
    ]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        if "example" in content:
            parts.append(f'<p class="soft">{escape(kind)}</p>{_json(content["example"])}')
    ok = operation["responses"]["200"]["content"]["application/json"]
    if "example" in ok:
        parts.append(f"<details><summary>answer</summary>{_json(ok['example'])}</details>")
    errors = {status: told["description"] for status, told in operation["responses"].items() if status != "200"}
    if errors:
        rows = "".join(f"<tr><td>{status}</td><td>{escape(meaning)}</td></tr>" for status, meaning in errors.items())
        parts.append(f"<details><summary>errors</summary><table>{rows}</table></details>")
    return "".join([*parts, "</article>"])


def _json(value: Any) -> str:
    return f"<pre>{escape(json.dumps(shortened(value), indent=2, ensure_ascii=False))}</pre>"


def gateway_page(models: Sequence[ModelStatus], document: Document, *, base_url: str) -> str:
    """Return the page of every declared model, each with its state and one command to paste."""
    parts = [
        '<h1>Roundhouse</h1><p class="lead">'
        f'{len(models)} models behind one address · <a href="/openapi.json">openapi.json</a></p>'
    ]
    parts += [_model(status, base_url) for status in models]
    parts.append("<h2>Across the models</h2>")
    for path, operations in document["paths"].items():
        parts += [_operation(path, method, operation) for method, operation in operations.items()]
    return _page("Roundhouse", "".join(parts))


def _model(status: ModelStatus, base_url: str) -> str:
    known = status.phase if status.phase in ("ready", "failed") else "waiting"
    message = f": {status.message}" if status.message else ""
    replicas = f" · {status.ready_replicas} of {status.target_replicas} replicas" if status.target_replicas > 1 else ""
    title = escape(status.name)
    if status.ready:
        title = f'<a href="/v2/models/{title}/docs">{title}</a>'
    request = json.dumps(status.request) if status.request else None
    return (
        f'<article><h2>{title}<span class="state {known}">{escape(status.phase + message)}</span></h2>'
        f'<p>{escape(status.description)} <span class="soft">{escape(status.task)}{replicas}</span></p>'
        f"<pre>{escape(curl(status.name, status.task, base_url, request=request))}</pre></article>"
    )
