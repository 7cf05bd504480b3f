"""A search whose networks are evaluated elsewhere, several at a time: by the trials of an experiment."""

from __future__ import annotations

import csv
import inspect
import io
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nni_dbs.algorithms.dbs import DBSSearch
from nni_dbs.errors import ConfigError, TrainingError
from nni_dbs.files import write
from nni_dbs.guided import GuidedEvolution
from nni_dbs.pool import chances_of
from nni_dbs.problem import Problem
from nni_dbs.result import append_search, load_search
from nni_dbs.search import EvolutionSearch, GreedySearch, PriorSearch, RandomSearch, Searcher
from nni_dbs.space import Widths, WidthSpace
from torch_pruning_adapters import WidthError, check_widths
from torch_pruning_adapters.errors import nearest

SEARCHERS: dict[str, type[Searcher]] = {
    "dbs": DBSSearch,
    "evolution": EvolutionSearch,
    "greedy": GreedySearch,
    "guided_evolution": GuidedEvolution,
    "prior": PriorSearch,
    "random": RandomSearch,
}


class Study:
    """Proposes networks, and learns their results in any order.

    Every result goes to the log as it arrives, and to `results.csv` beside it: a row for each network that
    was proposed, whose score stays empty while, or if, there is none. (NNI asks for a network or two more
    than it runs, where several trials end at once.) The log is all of the state: a study on the same log
    goes on, and proposes nothing again that is in it.

    Args:
        problem: What to search.
        log: Path of the `search.jsonl`; what it holds already is known from the start. None: no files.
        budget: In place of the problem's own.
        searcher: `dbs`, `evolution`, `greedy`, `guided_evolution`, `prior` or `random`.
        seed: Of the searcher.
        per_round: How many networks the searcher is asked for at a time; each time it learns from all results
            so far.
        optimize_mode: `maximize` or `minimize`, of the scores.
        resumed: Networks that were proposed before, and have no result, are still being evaluated. Otherwise
            they will be proposed again, first.
        options: The searcher's own: `points`, `starts`, `fresh`, `optimism` (dbs, guided_evolution), `latent`
            (dbs), `population`, `generations` (guided_evolution), `initial`, `parents` (evolution),
            `mutation` (both evolutions).

    Attributes:
        searcher: That proposes.
        scores: Network -> score, of all results.

    Raises:
        ConfigError: An argument without a meaning, or a log of another problem.
        BudgetError: No network of the problem keeps the budget.
        ResultError: A log that cannot be read or written.
    """

    def __init__(
        self,
        problem: Problem,
        log: Path | None,
        *,
        budget: float | str | Mapping[str, float | str] | None = None,
        searcher: str = "dbs",
        seed: int = 0,
        per_round: int = 4,
        optimize_mode: str = "maximize",
        resumed: bool = False,
        **options: Any,
    ) -> None:
        given = {"searcher": searcher, "seed": seed, "per_round": per_round, "optimize_mode": optimize_mode}
        check_arguments({**given, **options})
        self.problem = problem
        self.bounds = problem.bounds(budget)
        self.log = log
        self.per_round = per_round
        self.scores: dict[Widths, float] = {}
        self._class = SEARCHERS[searcher]
        self._options: dict[str, Any] = {"seed": seed, **options}
        self._sign = 1 if optimize_mode == "maximize" else -1
        self._rows: dict[Widths, dict[str, Any]] = {}  # of results.csv: what was proposed or told, in order
        self._pending: set[Widths] = set()  # proposed, and evaluated at present
        self._waiting: deque[Widths] = deque()
        self.searcher = self._make(problem.space)
        self._read_files()
        self._go_on(resumed)

    def narrow(self, search_space: Mapping[str, Any]) -> None:
        """Proposes from a part of the problem's space from now on: as `WidthSpace.to_nni`, or empty for all.

        Raises:
            ConfigError: It is of another model, or not made of choices.
            BudgetError: None of its networks keeps the budget.
        """
        space = _narrowed(self.problem.space, search_space)
        if any(space.choices(name) != self.searcher.space.choices(name) for name in space.names):
            self.searcher = self._began(space)
            self._waiting.clear()

    def propose(self) -> Widths | None:
        """A network inside of the budget that was not proposed before; None when there are no more."""
        while True:
            if not self._waiting:
                self._waiting.extend(self.searcher.ask(self.per_round))
            if not self._waiting:
                return None
            widths = self._waiting.popleft()
            if widths not in self.scores and widths not in self._pending:
                self._pending.add(widths)
                self._row(widths)
                self._write_rows()
                return widths

    def learn(self, widths: Mapping[str, int], score: Any, trial: str | None = None) -> None:
        """Takes a result, also one of a network that was never proposed. The first one of a network counts.

        Args:
            widths: The network; groups that are missing have their full width.
            score: A finite number.
            trial: Who says so, for `results.csv`.

        Raises:
            WidthError: A network of another model.
            TrainingError: Not a finite number.
        """
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            who = "a trial" if trial is None else f"trial {trial}"
            raise TrainingError(
                f"{who} reported {score!r}: report a finite number, or a dict whose 'default' is one"
            )
        network = self._complete(widths)
        if network in self.scores:
            return
        self._tell(self.searcher, network, score)
        stage = self.searcher.stage(network)
        if self.log is not None:
            append_search(self.log, network, float(score), stage, self.problem.costs, self.bounds)
        self._remember(network, float(score), trial)
        self._pending.discard(network)
        self._write_rows()

    def ranked(self) -> list[Widths]:
        """All networks inside of the budget that have results, the one to keep first."""
        return self.searcher.ranked() if self.searcher.told else []

    def best(self) -> Widths:
        """The network to keep, by all results so far."""
        return self.searcher.best()

    def state_dict(self) -> dict[str, Any]:
        """All proposals in order, with their scores where there are any; JSON."""
        return {"proposed": [(dict(widths), self.scores.get(widths)) for widths in self._rows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of a study that was made alike; a log has more to say."""
        if self.log is not None:
            return
        for widths, score in state["proposed"]:
            network = self._complete(widths)
            self._row(network)
            if score is not None:
                self._remember(network, score)
        self._go_on(resumed=False)

    def _make(self, space: WidthSpace) -> Searcher:
        prior = self.problem.prior
        if self._class is EvolutionSearch and prior is not None:
            return EvolutionSearch(space, self.bounds, prior=chances_of(space, prior), **self._options)
        return self._class(space, self.bounds, **self._options)

    def _began(self, space: WidthSpace) -> Searcher:
        """A new searcher that knows all results."""
        searcher = self._make(space)
        for widths, score in self.scores.items():
            self._tell(searcher, widths, score)
        return searcher

    def _go_on(self, resumed: bool) -> None:
        """The searcher after all results, and what it has proposed already."""
        unfinished = [w for w in self._rows if w not in self.scores and self._allowed(self.problem.space, w)]
        if resumed:
            self._pending.update(unfinished)
        self.searcher, asked = self._replayed()
        self._waiting.extend(dict.fromkeys([*unfinished, *asked]))

    def _replayed(self) -> tuple[Searcher, list[Widths]]:
        """The searcher where an earlier run left it, and what it had asked for then.

        A run that evaluated one network after another goes on as if nothing had interrupted it. If the
        searcher asks for others than were proposed, as with another seed or several trials at a time, a new
        one learns the results.
        """
        searcher = self._make(self.problem.space)
        left = set(self._rows)
        asked: list[Widths] = []
        while left:
            asked = searcher.ask(self.per_round)
            left.difference_update(asked)
            if left and (not asked or any(widths not in self._rows for widths in asked)):
                return self._began(self.problem.space), []
            for widths in asked:
                if widths in self.scores:
                    self._tell(searcher, widths, self.scores[widths])
        return searcher, asked

    def _tell(self, searcher: Searcher, widths: Widths, score: float) -> None:
        if self._allowed(searcher.space, widths):
            searcher.tell(widths, self._sign * score)

    def _allowed(self, space: WidthSpace, widths: Widths) -> bool:
        """Of a log of another budget, for example, not all networks are."""
        return widths in space and self.bounds.fits(widths)

    def _remember(self, widths: Widths, score: float, trial: str | None = None) -> None:
        self.scores[widths] = score
        self._row(widths).update(score=score, trial=trial)

    def _complete(self, widths: Mapping[str, int]) -> Widths:
        check_widths(self.problem.space.groups, widths)
        return self.problem.space.decode(self.problem.space.encode(widths))

    def _read_files(self) -> None:
        """The table has the order of the proposals and the trials' names, the log all results."""
        if self.log is None:
            return
        try:
            for row in _table(self._path):
                network = self._complete({name: int(row[name]) for name in self.problem.space.names})
                self._row(network)["trial"] = row["trial"] or None
            for line in load_search(self.log):
                network = self._complete(line["widths"])
                self._remember(network, line["score"], self._row(network)["trial"])
        except (WidthError, KeyError, ValueError) as error:
            raise ConfigError(f"{self.log} is of another search ({error}): choose another log") from error

    @property
    def _path(self) -> Path:
        assert self.log is not None
        return self.log.parent / "results.csv"

    def _row(self, widths: Widths) -> dict[str, Any]:
        if widths not in self._rows:
            costs = {kind: cost(widths) for kind, cost in self.problem.costs.items()}
            row = {"trial": None, "score": None, **costs, "used": self.bounds.used(widths), **widths}
            self._rows[widths] = row
        return self._rows[widths]

    def _write_rows(self) -> None:
        if self.log is None:
            return
        table = io.StringIO()
        rows = list(self._rows.values())
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write(self._path, lambda path: path.write_text(table.getvalue()))


def _table(path: Path) -> list[dict[str, str]]:
    """Rows of a `results.csv`; none if there is no such file."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for arguments that a `Study` cannot take."""
    own = inspect.signature(Study.__init__).parameters
    name = given.get("searcher", own["searcher"].default)
    if name not in SEARCHERS:
        raise ConfigError(f"no searcher {name!r}{nearest(str(name), SEARCHERS)}")
    defaults = {
        p.name: p.default
        for p in (*own.values(), *inspect.signature(SEARCHERS[name].__init__).parameters.values())
        if type(p.default) in (bool, int, float, str) and p.name != "resumed"
    }
    for key, value in given.items():
        if key not in defaults:
            raise ConfigError(f"searcher {name!r} has no option {key!r}{nearest(key, defaults)}")
        if not _like(value, defaults[key]):
            raise ConfigError(f"{key}: expected {type(defaults[key]).__name__}, not {value!r}")
    if given.get("per_round", 1) < 1:
        raise ConfigError(f"per_round must be at least 1, not {given['per_round']}")
    if given.get("optimize_mode", "maximize") not in ("maximize", "minimize"):
        raise ConfigError(f"optimize_mode: maximize or minimize, not {given['optimize_mode']!r}")


def _like(value: Any, default: Any) -> bool:
    """Whether a value is of a default's type; whole numbers are numbers, truth values are not."""
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def _narrowed(space: WidthSpace, search_space: Mapping[str, Any]) -> WidthSpace:
    """The part of a space that an NNI search space offers."""
    if not search_space:
        return space
    offered = space.to_nni()
    for name in sorted(search_space.keys() ^ offered.keys()):
        where = "search space" if name in search_space else "problem"
        raise ConfigError(
            f"the search space is of another model: group {name!r} is in the {where} only; "
            "take space.to_nni(), or {} for all choices"
        )
    choices = {}
    for name, entry in search_space.items():
        if not isinstance(entry, Mapping) or entry.get("_type") != "choice" or not entry.get("_value"):
            raise ConfigError(f"search space, {name!r}: expected a choice of widths, not {entry!r}")
        for width in entry["_value"]:
            if width not in offered[name]["_value"]:
                raise ConfigError(
                    f"search space, {name!r}: {width!r} is not among the problem's {offered[name]['_value']}"
                )
        choices[name] = entry["_value"]
    return space.among(choices)
