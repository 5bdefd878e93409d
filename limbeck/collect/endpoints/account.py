"""What collecting cost, and what of it was wasted: facts for the ledger.

Billed is what the provider counted; where it did not say, because an answer was lost on its way, the most that it can
have been. Wasted is what bought no usable answer: requests that were lost (and were sent again), and answers that were
cut off, refused, filtered, unreadable or not what their schema asks for. Answers that are cut off are no waste where
the recipe keeps them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from limbeck.collect.endpoints.prices import Prices, dollars
from limbeck.collect.journal import IN_BATCH
from limbeck.collect.journal_sums import NO_QUOTA, Outcomes
from limbeck.records import Digest

_USABLE = frozenset({"stop", "tool_calls"})

_MEANING = (
    "what bought no usable answer: requests that were lost or failed and may have been billed, and answers that were "
    "{cut_off}refused, filtered, unreadable or not what their schema asks for{kept}"
)


@dataclass
class Account:
    """Adds up answers as they are written down; `prices` by teacher, for requests and for rows of batches."""

    prices: Mapping[str, Prices | None]
    batch_prices: Mapping[str, Prices | None] = field(default_factory=dict)
    keeps_cut_off: bool = False
    """Whether the recipe keeps answers that ran into `max_tokens`; then they are no waste, and counted apart."""
    batches: Counter[str] = field(default_factory=Counter)
    """Answers by the batch in which they came."""
    requests: Counter[str] = field(default_factory=Counter)
    money: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    """Answers that were cut off and are kept."""
    kept_money: int = 0

    unsaid: dict[Digest, str] = field(default_factory=dict)
    """Of what cannot be used, requests of which no tokens were counted, with their finish reason: nobody said what they
    cost."""

    def add(
        self,
        teacher: str,
        finish_reason: str,
        prompt_tokens: int,
        completion_tokens: int,
        batch: str | None = None,
        request: Digest | None = None,
    ) -> None:
        """Count an answer: what came in a batch, and what cannot be used as it is. One of a teacher without an endpoint
        costs nothing.
        """
        if batch is not None:
            self.batches[batch] += 1
        if teacher not in self.prices or finish_reason in _USABLE:
            return
        prices = (self.batch_prices if batch else self.prices).get(teacher)
        cost = 0 if prices is None else prices.cost(prompt_tokens, completion_tokens)
        if finish_reason == "length" and self.keeps_cut_off:
            self.kept, self.kept_money = self.kept + 1, self.kept_money + cost
            return
        self.requests[finish_reason] += 1
        self.money[finish_reason] += cost
        if request is not None and prices is not None and not prompt_tokens and not completion_tokens:
            self.unsaid[request] = finish_reason

    def told(self, costs: Mapping[Digest, int]) -> None:
        """What the journal counted for requests of which nobody said what they cost, in picodollars."""
        for request, cost in costs.items():
            self.money[self.unsaid.pop(request)] += cost

    def facts(self, outcomes: Mapping[str, Outcomes], cap: float | None) -> dict[str, JsonValue]:
        """What the ledger gets to know; empty where no endpoint was asked."""
        if not self.prices:
            return {}
        lost = lost_of(outcomes)
        wasted = wasted_by(lost)
        wasted |= {
            name: {"answers": count, "dollars": dollars(self.money[name])}
            for name, count in sorted(self.requests.items())
        }
        return {
            "money": {
                "spent_dollars": dollars(sum(one.cost for one in outcomes.values())),
                "cap_dollars": cap,
                "batches": len(self.batches),
                "answers_in_batches": self.batches.total(),
                "batch_prices": {
                    name: one.source if one else "unknown" for name, one in sorted(self.batch_prices.items())
                }
                if self.batches
                else {},
                "prices": {name: one.source if one else "unknown" for name, one in sorted(self.prices.items())},
                "requests": {name: one.requests for name, one in sorted(outcomes.items())},
                "wasted": wasted,
                "waste": by_kind(wasted),
                "waste_is": _MEANING.format(
                    cut_off="" if self.keeps_cut_off else "cut off, ",
                    kept="; answers that were cut off are kept, and not counted" if self.keeps_cut_off else "",
                ),
                "wasted_dollars": dollars(sum(one.cost for one in lost.values()) + self.money.total()),
                "kept_cut_off": {"answers": self.kept, "dollars": dollars(self.kept_money)},
            }
        }


def lost_of(outcomes: Mapping[str, Outcomes]) -> dict[str, Outcomes]:
    """Those of the outcomes that brought nothing."""
    return {name: one for name, one in outcomes.items() if name not in ("answered", "refused", "not sent", IN_BATCH)}


def wasted_by(lost: Mapping[str, Outcomes]) -> dict[str, JsonValue]:
    """Requests that brought nothing, as facts."""
    return {
        name: {"requests": one.requests, "dollars_at_most": dollars(one.cost)} for name, one in sorted(lost.items())
    }


_KINDS = {
    "http 408": "time-outs",
    "http 504": "time-outs",
    "timeout": "time-outs",
    "length": "truncations",
    "context_length": "truncations",
    "refusal": "refusals",
    "content_filter": "refusals",
    "malformed": "unparsable",
    "schema": "not what their schema asks for",
    "error": "refused requests",
    "killed": "in flight when a run was killed",
}
"""In a reader's words; other finish reasons are named as they are."""


def _kind_of(outcome: str) -> str:
    """In a reader's words, of a request that brought nothing. Only what is sent again is a retry."""
    if outcome.endswith(NO_QUOTA):
        return "used-up quotas"
    return "refused requests" if outcome.startswith("http 4") and outcome != "http 429" else "retries"


def by_kind(wasted: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """What was wasted, summed by kind: requests or answers, and dollars at most."""
    counts, money = Counter[str](), Counter[str]()
    for name, told in wasted.items():
        if not isinstance(told, dict):
            continue
        kind = _KINDS.get(name) or (_kind_of(name) if "requests" in told else name)
        for key, value in told.items():
            if isinstance(value, int | float):
                (counts if key in ("requests", "answers") else money)[kind] += value  # type: ignore[operator]
    return {kind: {"count": int(counts[kind]), "dollars_at_most": float(money[kind])} for kind in sorted(counts)}
