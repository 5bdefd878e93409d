"""A test server for recipes: OpenAI- and Anthropic-compatible, with a bill and faults on request.

    with Server(Settings(words=50), Faults(faults=(Cut(when="after_billing", attempts=1),))) as server:
        ...  # point a recipe's base_url at server.url + "/v1", or an Anthropic client at server.url
        print(server.bill.money, server.bill.doubled)

Also as a command, `python -m limbeck.testing`. Needs the extra `collect`.

server       the socket, the table of paths, the thread
service      the way of a request: faults, limits, idempotency, billing, sending
settings     models, prices, length and delay of answers
faults       the schedule of what goes wrong
limits       rate limits as token buckets, and their headers
bill         what was charged
answers      what is answered, as a pure function of the request
vocabulary   the toy tokens, and their distribution
schema       instances of JSON schemas, for tools and structured output
calls        what endpoints are given and give back
requests     what the providers' bodies have in common
errors       refusals in each provider's shape
batches      rows that are worked off over time
routes       every path that does not answer prompts
models       GET /v1/models
openai_chat, openai_responses, openai_completions, openai_batches (files too), anthropic, anthropic_batches
             one part of a provider's API each
"""

from importlib.util import find_spec

if find_spec("aiohttp") is None or find_spec("orjson") is None:
    raise ImportError("limbeck.testing needs aiohttp and orjson: pip install 'limbeck[collect]'", name="aiohttp")

from limbeck.testing.answers import body_digest
from limbeck.testing.bill import Bill, Charge
from limbeck.testing.errors import Refused
from limbeck.testing.faults import (
    BadBatch,
    Cut,
    Delay,
    Drip,
    Faults,
    Limit,
    Malformed,
    OffSchema,
    RateLimit,
    Refusal4xx,
    ServerError,
    Timeout,
    Truncated,
    Withheld,
    WrongType,
)
from limbeck.testing.server import Server
from limbeck.testing.settings import Model, Settings

__all__ = [
    "BadBatch",
    "Bill",
    "Charge",
    "Cut",
    "Delay",
    "Drip",
    "Faults",
    "Limit",
    "Malformed",
    "Model",
    "OffSchema",
    "RateLimit",
    "Refusal4xx",
    "Refused",
    "Server",
    "ServerError",
    "Settings",
    "Timeout",
    "Truncated",
    "Withheld",
    "WrongType",
    "body_digest",
]
