"""Plain FastAPI: the model behind a small asyncio batcher, or in a thread pool without batches.

Usage: fastapi_server.py minilm|noop batcher|pool PORT
"""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response


class Batcher:
    """At most 32 texts, waiting at most 5 ms for each other."""

    def __init__(self, run):
        self._run, self._queue, self._pool = run, asyncio.Queue(), ThreadPoolExecutor(1)

    async def submit(self, item):
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((item, future))
        return await future

    async def work(self):
        loop = asyncio.get_running_loop()
        while True:
            batch, end = [await self._queue.get()], loop.time() + 0.005
            while len(batch) < 32:
                try:
                    batch.append(self._queue.get_nowait())
                except asyncio.QueueEmpty:
                    left = end - loop.time()
                    if left <= 0:
                        break
                    try:
                        batch.append(await asyncio.wait_for(self._queue.get(), left))
                    except TimeoutError:
                        break
            items, futures = zip(*batch, strict=True)
            try:
                results = await loop.run_in_executor(self._pool, self._run, items)
            except Exception as error:
                for future in futures:
                    future.set_exception(error)
                continue
            for future, result in zip(futures, results, strict=True):
                if not future.done():
                    future.set_result(result)


def minilm(kind):
    from bare_model import MiniLM

    model, app, tasks = MiniLM(), FastAPI(), []
    if kind == "batcher":

        @app.on_event("startup")
        async def start():
            app.state.batcher = Batcher(model.embed)
            tasks.append(asyncio.create_task(app.state.batcher.work()))

        @app.post("/embed")
        async def embed(request: Request):
            vector = await app.state.batcher.submit(orjson.loads(await request.body())["text"])
            return answer({"embedding": vector})

    else:

        @app.post("/embed")
        def embed(body: dict):
            return answer({"embedding": model.embed([body["text"]])[0]})

    return app


def noop():
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request):
        return answer({"y": orjson.loads(await request.body())["x"]})

    return app


def answer(body):
    return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


if __name__ == "__main__":
    what, kind, port = sys.argv[1:]
    app = minilm(kind) if what == "minilm" else noop()
    uvicorn.run(app, host="127.0.0.1", port=int(port), access_log=False, log_level="warning")
