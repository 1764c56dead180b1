"""Asks a running cluster many questions at a time and says what came of them; can kill an engine replica in the middle.

    python -m examples.scale.show --url http://127.0.0.1:7860 --visitors 8 --seconds 20 --kill-after 8

Each visitor leads conversations of three questions over the API, streaming. `--kill-after` needs ray and works where the
replica's process is on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

QUESTIONS = ("What is anaemia, number {n}?", "What are its causes?", "How is it found?")


@dataclass
class Seen:
    """What happened: ends by name, tokens, seconds to the first word, fingerprints, and answers that were wrong in form."""

    ends: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    reused: int = 0
    prompt: int = 0
    first: list[float] = field(default_factory=list)


async def ask(client: httpx.AsyncClient, messages: list[dict[str, str]], name: str, most: int, seen: Seen) -> str:
    """One answer; its text, "" where it failed."""
    asked = {"messages": messages, "stream": True, "max_tokens": most, "user": name, "temperature": 0}
    text, began, end = "", time.monotonic(), "cut off"
    async with client.stream(
        "POST", "/v1/chat/completions", json=asked | {"stream_options": {"include_usage": True}}
    ) as sent:
        if sent.status_code != 200:
            await sent.aread()
            seen.ends[f"{sent.status_code} {sent.json()['error']['code']}"] += 1
            return ""
        async for line in sent.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                end = f"error event {chunk['error']['code']}"
            elif usage := chunk.get("usage"):
                seen.tokens += usage["completion_tokens"]
                seen.prompt += usage["prompt_tokens"]
                seen.reused += usage["prompt_tokens_details"]["cached_tokens"]
            elif chunk["choices"][0]["finish_reason"]:
                end = chunk["choices"][0]["finish_reason"]
                seen.served[chunk["system_fingerprint"]] += 1
            elif word := chunk["choices"][0]["delta"].get("content"):
                if not text:
                    seen.first.append(time.monotonic() - began)
                text += word
    seen.ends[end] += 1
    return text if end in ("stop", "length") else ""


async def visitor(client: httpx.AsyncClient, number: int, until: float, most: int, seen: Seen) -> None:
    """Leads conversations until the time is over; what has begun ends."""
    talk = 0
    while time.monotonic() < until:
        talk, messages = talk + 1, []
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question.format(n=1000 * number + talk)})
            text = await ask(client, messages, f"visitor-{number}", most, seen)
            if not text or time.monotonic() > until:
                break
            messages.append({"role": "assistant", "content": text})


def kill_one() -> str:
    """Kills the replica that has the most to do, without warning; says what it had."""
    import ray
    from ray import serve

    ray.init(address="auto", log_to_driver=False, logging_level="error")
    replicas = serve.get_deployment_handle("EngineReplica", "ming").broadcast("look").results()
    busiest = max(replicas, key=lambda one: one["running"] + one["waiting"])
    os.kill(busiest["pid"], signal.SIGKILL)
    return f"(killed a replica with {busiest['running'] + busiest['waiting']} answers)"


async def run(args: argparse.Namespace) -> dict[str, Any]:
    seen, began = Seen(), time.monotonic()
    key = {"Authorization": f"Bearer {args.key}"} if args.key else {}
    async with httpx.AsyncClient(
        base_url=args.url, timeout=300, headers=key, limits=httpx.Limits(max_connections=None)
    ) as client:
        work = [visitor(client, i, began + args.seconds, args.tokens, seen) for i in range(args.visitors)]
        everybody = asyncio.gather(*work)
        if args.kill_after:
            await asyncio.sleep(args.kill_after)
            seen.ends[await asyncio.to_thread(kill_one)] += 1
        await everybody
    spent, first = time.monotonic() - began, sorted(seen.first) or [0.0]
    return {
        "seconds": round(spent, 1),
        "answers": dict(seen.ends),
        "tokens_per_second": round(seen.tokens / spent, 1),
        "first_word_p50_p95": [round(first[len(first) // 2], 2), round(first[int(len(first) * 0.95)], 2)],
        "prompt_from_memory": round(seen.reused / max(seen.prompt, 1), 2),
        "fingerprints": dict(seen.served),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--key", default="", help="an API key, where the server has some")
    parser.add_argument("--visitors", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--tokens", type=int, default=60, help="of an answer, at most")
    parser.add_argument("--kill-after", type=float, default=0, metavar="SECONDS")
    print(json.dumps(asyncio.run(run(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
