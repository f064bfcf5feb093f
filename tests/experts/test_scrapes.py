# SPDX-License-Identifier: Apache-2.0
"""Those who scrape at about the same time get one answer, which is never older than their question.

The app behind is an ASGI app of a few lines that counts; ``test_exposition.py`` has vLLM's own.
"""

import asyncio
import time
from collections.abc import Callable

import httpx
import pytest

from vllm_mixprec.experts import scrapes


class Counting:
    """Answers with how often it was asked; takes some time for it."""

    def __init__(self, takes_s: float = 0.01) -> None:
        self.asked = 0
        self._takes_s = takes_s

    async def __call__(self, scope, receive, send) -> None:
        self.asked += 1
        body = f"{scope['path']} {self.asked}".encode()
        await asyncio.sleep(self._takes_s)
        if scope["headers"] and (b"x-fail", b"yes") in scope["headers"]:
            raise RuntimeError("no metrics today")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-of", b"vllm")]})
        await send({"type": "http.response.body", "body": body, "more_body": False})


def run(app: Counting, scrape: Callable) -> None:
    async def inside() -> None:
        transport = httpx.ASGITransport(scrapes.Scrapes(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await scrape(client)

    asyncio.run(inside())


def test_two_hundred_scrapers_are_answered_a_few_times():
    app = Counting()

    async def scrape(client: httpx.AsyncClient) -> None:
        async def one(number: int) -> str:
            await asyncio.sleep(number / 400)  # over half a second
            answer = await client.get("/metrics")
            assert answer.status_code == 200 and answer.headers["x-of"] == "vllm"
            assert int(answer.headers["content-length"]) == len(answer.content)
            return answer.text

        begun = time.monotonic()
        answers = await asyncio.gather(*map(one, range(200)))
        took = time.monotonic() - begun
        most = 2 + took / scrapes._LONGEST_REST_S
        assert len(set(answers)) == app.asked <= most

    run(app, scrape)


def test_an_answer_is_formatted_after_the_question():
    """A scrape that comes while another's answer is being made gets the next one."""
    app = Counting(0.05)

    async def scrape(client: httpx.AsyncClient) -> None:
        first = asyncio.create_task(client.get("/metrics"))
        await asyncio.sleep(0.02)
        assert app.asked == 1
        second = await client.get("/metrics")
        assert ((await first).text, second.text) == ("/metrics 1", "/metrics 2")

    run(app, scrape)


def test_a_lone_scraper_does_not_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scrapes, "_LONGEST_REST_S", 1.0)
    app = Counting()

    async def scrape(client: httpx.AsyncClient) -> None:
        for _ in range(2):
            begun = time.monotonic()
            await client.get("/metrics")
            assert time.monotonic() - begun < 0.5
            await asyncio.sleep(1.05)

    run(app, scrape)


def test_other_questions_have_answers_of_their_own():
    app = Counting()

    async def scrape(client: httpx.AsyncClient) -> None:
        paths = ("/metrics", "/metrics?name[]=a", "/metrics?name[]=a", "/metrics/", "/metrics/more")
        answers = [each.text for each in await asyncio.gather(*map(client.get, paths))]
        posted = await asyncio.gather(*(client.post("/metrics") for _ in range(2)))
        assert answers[0] == answers[3]
        assert len({*answers, *(each.text for each in posted)}) == app.asked == 6

    run(app, scrape)


def test_many_questions_do_not_queue_before_a_scraper():
    app = Counting()

    async def scrape(client: httpx.AsyncClient) -> None:
        others = [client.get(f"/metrics?number={number}") for number in range(50)]
        tasks = [asyncio.ensure_future(other) for other in others]
        begun = time.monotonic()
        await client.get("/metrics")
        assert time.monotonic() - begun < 20 * scrapes._LONGEST_REST_S
        assert all(each.status_code == 200 for each in await asyncio.gather(*tasks))

    run(app, scrape)


def test_an_error_reaches_all_who_asked_and_no_other():
    app = Counting()

    async def scrape(client: httpx.AsyncClient) -> None:
        asked = [client.get("/metrics", headers={"x-fail": "yes"}) for _ in range(3)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [str(error) for error in found] == ["no metrics today"] * 3
        assert (await client.get("/metrics")).status_code == 200

    run(app, scrape)


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_scraper_that_leaves_takes_nobodys_answer_along(leaver: int):
    app = Counting(0.05)

    async def scrape(client: httpx.AsyncClient) -> None:
        tasks = [asyncio.create_task(client.get("/metrics")) for _ in range(2)]
        await asyncio.sleep(0.01)
        tasks[leaver].cancel()
        assert (await tasks[1 - leaver]).text == "/metrics 1"

    run(app, scrape)
