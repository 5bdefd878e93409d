"""Why sending stops before everything is answered, in words with a remedy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from limbeck.collect.endpoints.budget import Budget
from limbeck.collect.endpoints.fates import message
from limbeck.collect.endpoints.prices import dollars
from limbeck.errors import EndpointError, LimbeckError, Problem, RefusedError

_AGAIN = "run the same command again: what was answered is not asked again"


class Reasons:
    """Collects the reasons; the first one to stop counts."""

    def __init__(self, teacher: str, journal: Path):
        self._teacher, self._journal = teacher, journal
        self._unanswered: Counter[str] = Counter()
        self.stop: Exception | None = None

    def note(self, why: Exception) -> None:
        """Remember a reason to stop."""
        self.stop = self.stop or why

    def unanswered(self, said: str, requests: int = 1) -> None:
        """So many requests were given up."""
        self._unanswered[said] += requests

    def result(self) -> Exception | None:
        """Why not everything was answered; None where it was."""
        if self.stop is None and self._unanswered:
            counts = ", ".join(f"{kind} {count}" for kind, count in self._unanswered.most_common())
            found = f"{self._unanswered.total()} requests given up; the last attempt ended in: {counts}"
            return self._error("requests stayed without an answer", found, "an answer each", f"later, {_AGAIN}")
        return self.stop

    def cap_reached(self, budget: Budget) -> LimbeckError:
        """The next request might pass the cap."""
        cap, spent = dollars(budget.cap or 0), dollars(budget.spent)
        found = f"{spent:.6f} US dollars spent or maybe spent, and the next request might pass the cap"
        remedy = (
            "raise collect.budget.money, or set collect.unanswered: leave_out to go on with what was answered; either "
            f"with another --out and collect.journal: {self._journal}, so that what was answered is not paid for again"
        )
        return RefusedError(
            "the money cap is reached", [Problem("collect.budget.money", found, f"{cap} at most", remedy)]
        )

    def no_quota(self, told: str) -> LimbeckError:
        """The provider has no more for us."""
        return self._error("the provider's quota is used up", told, "a quota that is left", f"raise it, then {_AGAIN}")

    def refuses(self, status: int, told: str) -> LimbeckError:
        """Every request would be refused."""
        remedy = {
            401: "check the key that api_key_env or api_key_file names",
            404: "check model and base_url",
        }.get(status, "check base_url, model and key")
        return Fatal("the endpoint refuses requests", self._problem(f"status {status}: {told}", "answers", remedy))

    def all_refused(self, count: int, body: bytes) -> LimbeckError:
        """Nothing was answered, and everything refused."""
        remedy = "correct what it complains of; keys that this model refuses can be left out with teacher.omit"
        found = f"{count} requests refused and none answered: {message(body)}"
        return Fatal("the endpoint refuses every request", self._problem(found, "answers", remedy))

    def given_up(self, said: str) -> LimbeckError:
        """The endpoint failed for too long."""
        return self._error("the endpoint fails", f"no success for minutes, the last: {said}", "answers", _AGAIN)

    def unreachable(self, address: str, why: str) -> LimbeckError:
        """No request of this command ever reached it."""
        remedy = "check that it answers from here, and teacher.base_url: RUN takes another one while it has no answer"
        problem = Problem(f"teacher {self._teacher}: {address}", why, "a connection", f"{remedy}; then {_AGAIN}")
        return EndpointError("the endpoint cannot be reached", [problem])

    def interrupted(self) -> Exception:
        """Somebody pressed Ctrl-C."""
        return Interrupted()

    def journal(self, error: BaseException) -> Exception:
        """An answer could not be written."""
        return error if isinstance(error, Exception) else RuntimeError(str(error))

    def _problem(self, found: str, expected: str, remedy: str) -> list[Problem]:
        return [Problem(f"teacher {self._teacher}", found, expected, remedy)]

    def _error(self, summary: str, found: str, expected: str, remedy: str) -> LimbeckError:
        return EndpointError(summary, self._problem(found, expected, remedy))


class Fatal(EndpointError):  # noqa: N818 - an EndpointError, and no new kind for users
    """An endpoint that answers nothing: nobody should go on with the answers there are."""


class Interrupted(Exception):  # noqa: N818 - no error
    """Somebody pressed Ctrl-C; what is under way is awaited."""
