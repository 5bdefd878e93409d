"""The cap holds to the last picodollar, whatever prices, lengths and failures."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import pytest
from asking import ask, file_of, made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.collect.endpoints.budget import Budget, CapReachedError, Purse
from limbeck.collect.endpoints.prices import PICO, dollars, picodollars, prices_of
from limbeck.errors import RefusedError
from limbeck.recipe import AnthropicTeacher, OpenAITeacher
from limbeck.testing import BadBatch, Cut, Faults, Malformed, Model, Server, ServerError, Settings, Truncated


@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 10**5), st.floats(0, 1), st.booleans()), max_size=60),
)
@settings(max_examples=200, deadline=None)
def test_spent_and_set_aside_never_pass_the_cap(cap: int, schedule: list[tuple[int, float, bool]]):
    budget, under_way = Budget(cap), list[tuple[int, int]]()
    for worst, share, settle in schedule:
        held = budget.hold(worst)
        assert (held is None) == (budget.spent + sum(h for h, _ in under_way) + worst > cap)
        if held is not None:
            under_way.append((held, int(share * worst)))
        if settle and under_way:
            budget.settle(*under_way.pop(len(under_way) // 2))
        assert budget.spent + budget.held <= cap
        assert budget.held == sum(h for h, _ in under_way)


def test_who_costs_more_than_was_set_aside_makes_others_set_more_aside():
    budget = Budget(1000)
    held = budget.hold(100)
    assert held == 100
    budget.settle(100, 150)
    assert budget.hold(100) == 150


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=40), st.integers(50, 400))
@settings(max_examples=60, deadline=None)
def test_everybody_is_served_or_told(jobs: list[tuple[int, float]], cap: int):
    """In order; and when one is told that the cap is reached, nothing was under way, and it did not fit."""

    async def work() -> None:
        purse, served = Purse(Budget(cap)), list[int]()

        async def one(number: int, worst: int, share: float) -> None:
            held = await purse.hold(worst)
            served.append(number)
            await asyncio.sleep(0)
            purse.settle(held, int(share * worst))
            assert purse.budget.spent <= cap

        results = await asyncio.gather(*(one(n, *job) for n, job in enumerate(jobs)), return_exceptions=True)
        assert all(r is None or isinstance(r, CapReachedError) for r in results), results
        assert served == sorted(served)
        assert purse.budget.held == 0
        for (worst, _), result in zip(jobs, results, strict=True):
            if result is not None:
                assert worst > cap - purse.budget.spent

    asyncio.run(work())


PRICES = st.decimals(min_value="0", max_value="60", places=4)


@given(
    prompt=PRICES, answer=PRICES, words=st.integers(1, 60), spread=st.floats(0, 1), cap=st.floats(0.0005, 0.02),
    seed=st.integers(0, 99), concurrency=st.integers(1, 12),
    batch=st.sampled_from([False, {"poll": 0.02}, {"poll": 0.02, "rows": 7}, {"poll": 0.02, "rows": 7}]),
    kind=st.sampled_from(["openai", "responses", "anthropic"]),
    bad=st.lists(st.sampled_from([
        BadBatch(kind="batch_expired", share=0.4, window=(0, 0.1)), BadBatch(kind="batch_rows", share=0.3),
        Cut(when="after_billing", attempts=1, endpoints=("/v1/batches", "/v1/messages/batches")),
        Cut(when="mid_body", attempts=1, endpoints=("/v1/files/*", "/v1/messages/batches/*")),
        Cut(when="after_billing", probability=0.2), Cut(when="before_billing", probability=0.1),
        ServerError(probability=0.1), ServerError(status=504, probability=0.1), Truncated(probability=0.2),
        Malformed(probability=0.2), Cut(when="mid_body", probability=0.2),
    ]), max_size=3, unique=True),
)  # fmt: skip
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_bill_never_passes_the_cap(
    tmp_path_factory: pytest.TempPathFactory, prompt, answer, words, spread, cap, seed, concurrency, batch, kind, bad
):
    root = tmp_path_factory.mktemp("money")
    priced = {"price": {"input": float(prompt), "output": float(answer)}}
    model = Model(input=prompt, output=answer)
    served = Settings(words=words, spread=spread, models={"toy": model}, idempotency=False, batch_seconds=0.03)
    with pytest.MonkeyPatch.context() as patch, Server(served, Faults(faults=tuple(bad), seed=seed)) as server:
        patch.setattr("limbeck.collect.endpoints.sending._BACKOFF", 0.001)
        patch.setattr("limbeck.collect.endpoints.pacing._PROBE_FIRST", 0.01)
        patch.setattr("limbeck.collect.endpoints.batch_calls._BACKOFF", 0.001)
        patch.setattr("limbeck.collect.endpoints.batch_calls._SETTLE", 0.05)
        patch.setattr("limbeck.collect.endpoints.batching._FIRST_LOOK", 0.02)
        recipe = made(server.url, file_of(root, 40), kind=kind, teacher=priced, batch=batch, max_tokens=64,
                      concurrency=concurrency, budget={"money": cap}, unanswered="leave_out")  # fmt: skip
        for _ in range(2):
            try:
                facts, rows = ask(recipe, root / "run")
            except RefusedError:  # not even one fits, or what was billed was lost on its way
                assert bad or server.bill.requests == 0
                continue
            assert facts["money"]["spent_dollars"] <= cap
            assert Decimal(str(facts["money"]["spent_dollars"])) >= server.bill.money - Decimal("1e-12")
            assert len({c.prompt_id for c in rows}) == len(rows)
        assert server.bill.money <= Decimal(str(cap))


# Prices


def test_prices_come_from_the_recipe_or_the_snapshot():
    own = OpenAITeacher(base_url="http://127.0.0.1:1/v1", model="m")
    assert prices_of(own) is None
    priced = prices_of(own.model_copy(update={"price": OpenAITeacher.model_validate(
        {"model": "m", "price": {"input": 0.15, "output": 0.6}}).price}))  # fmt: skip
    assert priced is not None
    assert priced.cost(1_000_000, 1_000_000) == picodollars(0.75)
    listed = prices_of(OpenAITeacher(model="gpt-4o"))
    assert listed is not None
    assert "openai/gpt-4o" in listed.source
    assert dollars(listed.cost(1000, 100)) == pytest.approx(0.0025 + 0.001)  # $2.50 and $10 a million
    claude = prices_of(AnthropicTeacher(model="claude-sonnet-4-5"))
    assert claude is not None
    assert dollars(claude.cost(1000, 1000)) == pytest.approx(0.018)  # $3 and $15 a million
    assert prices_of(OpenAITeacher(model="no-such-model")) is None


@given(st.decimals(min_value="0", max_value="1000", places=7), st.integers(0, 10**7))
@settings(deadline=None)
def test_a_price_is_never_rounded_down(price: Decimal, tokens: int):
    teacher = OpenAITeacher.model_validate({"model": "m", "price": {"input": float(price), "output": 0}})
    found = prices_of(teacher)
    assert found is not None
    exact = Decimal(str(float(price))) * tokens / 1_000_000
    assert exact <= Decimal(found.cost(tokens, 0)) / PICO <= exact + Decimal(tokens) / PICO
