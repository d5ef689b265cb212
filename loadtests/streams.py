"""Measure what running streams together gains: `python -m loadtests.streams` writes loadtests/reports/streams.md.

The default catalog's chat model is asked with OpenAI's client for answers of equal length, by one client and by eight,
in turn; what counts is the ratio of their tokens a second.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import openai
import yaml
from openai.types.chat import ChatCompletionChunk

from loadtests.peers.client import Exchange
from loadtests.peers.environments import ROOT
from loadtests.peers.processes import Tree, free_port
from loadtests.peers.report import machine
from loadtests.telemetry.__main__ import ready

MODEL = "smollm2"
REPORT = ROOT / "loadtests" / "reports" / "streams.md"
_TOGETHER = 8
_IS_READY = Exchange(f"GET /v2/models/{MODEL}/ready HTTP/1.1\r\nhost: a\r\n\r\n".encode(), lambda _: True)
_SUBJECTS = ("the sea", "a lighthouse", "bread", "a train", "winter", "a garden", "glass", "an old town")


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.streams", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer; default: 128")
    arguments = parser.parse_args()
    rows = asyncio.run(_measure(arguments.rounds, arguments.tokens))
    alone, together, ratio = (statistics.median(column) for column in zip(*rows, strict=True))
    told = "\n".join(f"| {number} | {a:.1f} | {b:.1f} | {r:.2f} |" for number, (a, b, r) in enumerate(rows, 1))
    report = f"""# Streams together

{time.strftime("%Y-%m-%d %H:%M")}; {MODEL}, answers of {arguments.tokens} tokens, through the platform.
`python -m loadtests.streams` measures again.

{machine()}

| round | 1 stream, tokens/s | {_TOGETHER} streams, tokens/s | ratio |
|---|---|---|---|
{told}
| median | {alone:.1f} | {together:.1f} | {ratio:.2f} |
"""
    REPORT.write_text(report)
    print(report)


async def _measure(rounds: int, tokens: int) -> list[tuple[float, float, float]]:
    """Return tokens a second alone and together, and their ratio, of every round."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        tree = _serve(Path(folder), port)
        try:
            await ready(port, _IS_READY, tree)
            client = openai.AsyncOpenAI(
                base_url=f"http://127.0.0.1:{port}/v2/models/{MODEL}/v1", api_key="none", max_retries=0
            )
            async with client:
                await _tokens_a_second(client, _TOGETHER, tokens)  # warms up
                for number in range(rounds):
                    alone = await _tokens_a_second(client, 1, tokens)
                    together = await _tokens_a_second(client, _TOGETHER, tokens)
                    rows.append((alone, together, together / alone))
                    print(f"round {number + 1}: {alone:.1f} alone, {together:.1f} together", file=sys.stderr)
        finally:
            tree.stop()
    return rows


def _serve(folder: Path, port: int) -> Tree:
    catalog = yaml.safe_load((ROOT / "models.yaml").read_text())
    declaration = folder / "models.yaml"
    declaration.write_text(yaml.safe_dump({"models": [each for each in catalog["models"] if each["name"] == MODEL]}))
    return Tree(
        [Path(sys.executable).with_name("roundhouse"), "up", declaration],
        environment={"ROUNDHOUSE_PORT": str(port), "ROUNDHOUSE_STATE_DIR": str(folder / "state")},
        folder=folder,
        log=folder / "up.log",
    )


async def _tokens_a_second(client: openai.AsyncOpenAI, streams: int, tokens: int) -> float:
    began = time.perf_counter()
    counts = await asyncio.gather(*(_answer(client, subject, tokens) for subject in _SUBJECTS[:streams]))
    return sum(counts) / (time.perf_counter() - began)


async def _answer(client: openai.AsyncOpenAI, subject: str, tokens: int) -> int:
    """Return how many tokens an answer had; ends with an error where they are too few to compare."""
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": f"Write a very long story about {subject}."}],
        max_tokens=tokens,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    last: ChatCompletionChunk | None = None
    async for chunk in stream:
        last = chunk
    if last is None or last.usage is None or last.usage.completion_tokens != tokens:
        sys.exit(f"an answer about {subject} ended early: {last}")
    return last.usage.completion_tokens


if __name__ == "__main__":
    main()
