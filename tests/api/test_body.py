"""Bodies that arrive in pieces, slowly or never, and what they may take meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serve.api.body import Uploads, read_body
from serve.errors import Cancelled, DeadlineExceeded, Overloaded, PayloadTooLarge
from tests.fake_time import run


class Client:
    """Sends a body in parts, each when the test says so; None leaves."""

    def __init__(self) -> None:
        self._parts: asyncio.Queue[tuple[bytes, bool] | None] = asyncio.Queue()

    def sends(self, part: bytes, *, more: bool = True) -> None:
        self._parts.put_nowait((part, more))

    def leaves(self) -> None:
        self._parts.put_nowait(None)

    async def receive(self) -> dict[str, Any]:
        part = await self._parts.get()
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part[0], "more_body": part[1]}


def reading(client: Client, uploads: Uploads, limit: int = 1000) -> asyncio.Task[bytes]:
    return asyncio.create_task(read_body({}, client.receive, limit=limit, uploads=uploads))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_bodies_that_arrive_slowly_are_bounded_together_and_count_no_more_once_read() -> None:
    uploads = Uploads(100, within_s=60)
    slow, late = Client(), Client()
    first = reading(slow, uploads)
    slow.sends(b"a" * 60)
    await turns()
    second = reading(late, uploads)
    late.sends(b"b" * 41)
    with pytest.raises(Overloaded, match="60 bytes are arriving, and at most 100") as refused:
        await second
    assert refused.value.retry_after_s > 0
    slow.sends(b"a" * 10, more=False)
    assert await first == b"a" * 70
    uploads.take(100)


@pytest.mark.parametrize("end", ["leaves", "too large", "cancelled"])
async def test_body_that_is_not_read_to_its_end_counts_no_more(end: str) -> None:
    uploads = Uploads(100, within_s=60)
    client = Client()
    read = reading(client, uploads, limit=80)
    client.sends(b"a" * 50)
    await turns()
    with pytest.raises(Overloaded):
        uploads.take(51)
    if end == "leaves":
        client.leaves()
        with pytest.raises(Cancelled):
            await read
    elif end == "too large":
        client.sends(b"a" * 50)
        with pytest.raises(PayloadTooLarge):
            await read
    else:
        read.cancel()
        await asyncio.wait([read])
    uploads.take(100)


async def test_body_in_one_piece_needs_no_room_to_arrive() -> None:
    client = Client()
    client.sends(b"whole", more=False)
    assert await reading(client, Uploads(0, within_s=60)) == b"whole"


def test_body_that_does_not_arrive_in_time_gives_its_room_back() -> None:
    async def story() -> None:
        uploads = Uploads(100, within_s=60)
        client = Client()
        client.sends(b"a" * 50)
        began = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineExceeded, match="had not arrived after 60 s"):
            await reading(client, uploads)
        assert asyncio.get_running_loop().time() == began + 60
        uploads.take(100)

    run(story())
