"""One peer asks the server of benchmarks/answering.py: `python collecting_peers.py NAME URL CONNECTIONS REQUESTS`.

Run by benchmarks/against.py in the peer's own environment. Each is used as its documentation shows, with as many
requests at a time as it is told and no bound on the rate that could hold it back. Printed, as JSON in the last line:
answers, seconds, processor seconds, and MiB at the most, from before the first prompt is handed over until all answers
are there, imports not counted.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

PROMPTS = "What is {} and {}?"


def openai_httpx(url: str, connections: int, requests: int) -> Callable[[], int]:
    """The openai client as it comes: httpx in version 2, httpx2 in version 3."""
    return _openai(url, connections, requests, None)


def openai_aiohttp(url: str, connections: int, requests: int) -> Callable[[], int]:
    """The openai client with its aiohttp transport."""
    from openai import DefaultAioHttpClient

    return _openai(url, connections, requests, DefaultAioHttpClient)


def _openai(url: str, connections: int, requests: int, transport: Callable[[], object] | None) -> Callable[[], int]:
    from openai import AsyncOpenAI

    async def ask() -> int:
        waiting, texts = iter(range(requests)), 0
        more = {"http_client": transport()} if transport else {}
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, **more) as client:

            async def work() -> None:
                nonlocal texts
                for number in waiting:
                    said = await client.chat.completions.create(
                        model="toy",
                        messages=[{"role": "user", "content": PROMPTS.format(number, number + 1)}],
                        max_tokens=1024,
                        temperature=0.7,
                    )
                    texts += bool(said.choices[0].message.content)

            await asyncio.gather(*(work() for _ in range(connections)))
        return texts

    return lambda: asyncio.run(ask())


def curator(url: str, connections: int, requests: int) -> Callable[[], int]:
    """Bespoke Curator through its OpenAI backend: requests and answers in its working directory, as it always does."""
    os.environ |= {"TELEMETRY_ENABLED": "false", "CURATOR_CACHE_DIR": tempfile.mkdtemp(), "OPENAI_API_KEY": "none"}
    found = find_spec("litellm")
    assert found is not None
    assert found.origin is not None
    # It counts tokens with tiktoken, which would fetch its vocabulary; litellm, which it needs, brings a copy.
    os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(found.origin).parent / "litellm_core_utils" / "tokenizers")
    from bespokelabs import curator as library

    class Asker(library.LLM):
        def prompt(self, input: dict) -> str:
            return input["prompt"]

        def parse(self, input: dict, response: str) -> dict:
            return {"text": response}

    def ask() -> int:
        rows = [{"prompt": PROMPTS.format(n, n + 1)} for n in range(requests)]
        asker = Asker(
            model_name="toy",
            backend="openai",
            generation_params={"max_tokens": 1024, "temperature": 0.7},
            backend_params={
                "base_url": f"{url}/v1",
                "max_concurrent_requests": connections,
                "max_requests_per_minute": 10_000_000,
                "max_tokens_per_minute": 10_000_000_000,
            },
        )
        found = asker(rows)
        return sum(bool(text) for text in getattr(found, "dataset", found)["text"])

    return ask


def distilabel(url: str, connections: int, requests: int) -> Callable[[], int]:
    """A distilabel pipeline of one text generation; a batch is asked all at once, so its size is the concurrency."""
    os.environ["DISTILABEL_LOG_LEVEL"] = "WARNING"
    from distilabel.models import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGeneration

    def ask() -> int:
        with Pipeline(name="collecting", cache_dir=tempfile.mkdtemp()) as pipeline:
            rows = [{"instruction": PROMPTS.format(n, n + 1)} for n in range(requests)]
            load = LoadDataFromDicts(data=rows, batch_size=connections)
            llm = OpenAILLM(
                model="toy",
                base_url=f"{url}/v1",
                api_key="none",
                generation_kwargs={"max_new_tokens": 1024, "temperature": 0.7},
            )
            load >> TextGeneration(llm=llm, input_batch_size=connections)
        found = pipeline.run(use_cache=False)
        return sum(bool(text) for text in found["default"]["train"]["generation"])

    return ask


def main() -> None:
    name, url, connections, requests = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    make = {f.__name__: f for f in (openai_httpx, openai_aiohttp, curator, distilabel)}[name]
    work = make(url, connections, requests)
    wall, processor = time.perf_counter(), _processor()
    answers = work()
    wall, processor = time.perf_counter() - wall, _processor() - processor
    # A pipeline's workers are processes of their own; of those, the largest is counted beside the first.
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    memory = sum(resource.getrusage(one).ru_maxrss for one in who) / 1024
    print()
    print(json.dumps({"answers": answers, "seconds": wall, "processor": processor, "memory": memory}), flush=True)


def _processor() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
