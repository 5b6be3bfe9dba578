"""Load on a running server: clients that chat at the same time, tokens per second, time to the first token.

    ds4jax serve &
    python tools/serve_load.py http://127.0.0.1:8000 1 8 64

Every client sends one conversation after another, each of its own, as a stream. The time to the first token is the
client's: from sending a request to the first piece of text, waiting for a session included. Needs `httpx`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time

import httpx


async def chat(client: httpx.AsyncClient, name: str, tokens: int) -> tuple[float, int]:
    """Seconds to the first piece of text, and tokens of the answer."""
    body = {
        "model": "any",
        "messages": [
            {"role": "user", "content": f"My name is {name}. Tell me a story about a king and his three sons."}
        ],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, made = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if not first and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = time.perf_counter() - began
            made = chunk["usage"]["completion_tokens"] if chunk.get("usage") else made
    return first, made


async def load(url: str, clients: int, requests: int, tokens: int) -> str:
    """One line of figures for so many clients."""

    async def one(client: httpx.AsyncClient, i: int) -> list[tuple[float, int]]:
        return [await chat(client, f"client {i} of {clients}, time {j}", tokens) for j in range(requests)]

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        began = time.perf_counter()
        answers = [
            answer for part in await asyncio.gather(*(one(client, i) for i in range(clients))) for answer in part
        ]
        seconds = time.perf_counter() - began
    firsts = sorted(first for first, _ in answers)
    p95 = firsts[min(int(0.95 * len(firsts)), len(firsts) - 1)]
    made = sum(count for _, count in answers)
    return (
        f"{clients} clients, {len(answers)} answers, {made} tokens: {made / seconds:.1f} tokens/s, "
        f"first token p50 {statistics.median(firsts):.2f} s, p95 {p95:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("clients", type=int, nargs="+", help="how many clients at once, one run each")
    parser.add_argument("--requests", type=int, default=4, help="requests of every client, one after another")
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    given = parser.parse_args()
    for clients in given.clients:
        print(asyncio.run(load(given.url, clients, given.requests, given.tokens)), flush=True)


if __name__ == "__main__":
    main()
