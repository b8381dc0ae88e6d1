"""One table of programs: curvatures, terminals, forms, networks, schedules and what else a step may be asked for.

Of metrics, terminals and forms the table holds the whole product; the other columns are filled so that every two
entries that may meet do. What a program does with a metric is the same for every curvature that has it: curvatures of
one metric share its meetings with networks. A program is compiled once a session; the checks of programs/test_matrix.py
share it.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gtddp_compile import Geometric, MonteCarlo
from support import cases, networks
from support.compared import SUM, Run, train
from support.networks import Case

GROUP = 3
NETWORKS: dict[str, Callable[[], Case]] = {
    build.__name__: build for build in (
        networks.mlp, networks.residual, networks.nested, networks.consecutive, networks.projection, networks.gated,
        networks.attention, networks.conv_residual, cases.conv_mixed, cases.embedded, cases.wide, cases.convolutional,
        cases.lines, cases.tokens, cases.rereading, cases.tied, cases.two_outputs, cases.gates, cases.sums, cases.late,
        cases.beside,
    )
} | {
    "evaluated": lambda: networks.conv_residual(training=False),
    "summed convolutions": lambda: cases.sums(2, "conv"),
    "a pair": lambda: cases.beside(2),
}  # fmt: skip
CURVATURES: dict[str, dict[str, Any]] = {
    "sgd": {"curvature": "sgd", "lr": 0.3},
    "momentum": {"curvature": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    "rmsprop": {"curvature": "rmsprop", "lr": 5e-3, "momentum": 0.5, "weight_decay": 0.05},
    "centered": {"curvature": "rmsprop", "lr": 5e-3, "centered": True},
    "adam": {"curvature": "adam", "lr": 1e-2, "amsgrad": True},
    "adamw": {"curvature": "adamw", "lr": 1e-2, "weight_decay": 0.1},
    "adagrad": {"curvature": "adagrad", "lr": 1e-2, "lr_decay": 0.1, "weight_decay": 0.05},
    "kfac": {"curvature": "kfac", "lr": 0.1, "damping": 1e-2, "refresh": 2, "momentum": 0.5, "weight_decay": 0.05},
    "ekfac": {"curvature": "ekfac", "lr": 0.05, "damping": 5e-2, "refresh": 1},
    "foof": {"curvature": "foof", "lr": 0.1, "damping": 0.1},
    "shampoo": {"curvature": "shampoo", "lr": 0.1, "momentum": 0.5, "weight_decay": 0.05, "eps": 1e-2},
    "soap": {"curvature": "soap", "lr": 1e-2, "eps": 1e-2},
    "muon": {"curvature": "muon", "lr": 3e-2, "damping": 0.1, "stat_momentum": 0.5},
}
METRICS: dict[str, tuple[str, ...]] = {
    "spherical": ("sgd", "momentum"), "diagonal": ("adam", "rmsprop", "centered", "adamw", "adagrad"),
    "turned": ("shampoo", "muon"), "turned diagonal": ("soap",), "kfac": ("kfac",), "ekfac": ("ekfac",),
    "foof": ("foof",),
}  # fmt: skip
TERMINALS: dict[str, Any] = {
    "gradient": "gradient", "geometric": Geometric(2.5, own=3), "ggn": "ggn", "sampled": MonteCarlo(2),
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "joint": {"coupling": "full"}, "joint groups": {"coupling": GROUP},
    "nonlinear": {"coupling": "full", "rollout": "nonlinear"},
    "nonlinear groups": {"coupling": GROUP, "rollout": "nonlinear"}, "block": {"coupling": "block"},
    "substituted": {"coupling": "block", "recursion": "substituted"},
    "printed": {"coupling": "block", "recursion": "printed"},
}  # fmt: skip
SCHEDULES = ("asap", "alap", "sequential")
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {}, "inertia": {"inertia": 0.9}, "capped": {"max_step": 0.1}, "clipped": {"feedback_clip": 0.02},
    "unclipped": {"feedback_clip": None}, "open": {"feedback": "open"}, "sum": {"loss": SUM},
    "alone": {"cooperative": False},
}  # fmt: skip


Pair = tuple[str, str, str, str]
"""Two columns, each with an entry."""


@dataclass(frozen=True)
class Row:
    """Entries of the table by name."""

    curvature: str
    terminal: str
    form: str
    network: str
    schedule: str
    extra: str

    def __str__(self) -> str:
        return "-".join(vars(self).values())

    @property
    def case(self) -> Case:
        return NETWORKS[self.network]()

    @property
    def options(self) -> dict[str, Any]:
        found = CURVATURES[self.curvature] | FORMS[self.form] | EXTRAS[self.extra]
        if self.extra == "inertia":  # in place of the base method's own
            own = {"betas": (0.0, 0.999)} if self.curvature in ("adam", "adamw", "soap", "muon") else {}
            own |= {"momentum": 0.0} if self.curvature == "muon" else {}
            found = {**found, **own, **{key: 0 for key in ("momentum", "nesterov") if key in found}}
        if self.form == "printed" and self.curvature in ("kfac", "ekfac", "foof"):  # Eq. 23 has no cross terms
            found = {**found, "cooperative": False}
        if self.extra == "sum":
            found = {**found, "lr": 0.2 * found["lr"]}
        return {**found, "terminal": TERMINALS[self.terminal], "schedule": self.schedule}

    @property
    def is_allowed(self) -> bool:
        """Whether both backends take it; that the others are refused by name has tests of its own."""
        linear, factors = self.form.startswith("joint"), self.terminal in ("ggn", "sampled")
        refused = {
            "inertia": FORMS[self.form]["coupling"] == "block",
            "capped": factors or not linear,
            "clipped": linear, "unclipped": linear, "open": linear,
            "sum": self.network == "two_outputs",  # a loss of its own
            "alone": self.curvature not in ("kfac", "ekfac"),
        }  # fmt: skip
        return not refused.get(self.extra, False) and not (self.network == "conv_residual" and factors)

    @property
    def metric(self) -> str:
        return next(metric for metric, curvatures in METRICS.items() if self.curvature in curvatures)

    def pair(self, left: str, right: str) -> Pair:
        """What two columns hold; beside a network a curvature counts as its metric."""
        if (left, right) == ("curvature", "network"):
            left = "metric"
        return left, getattr(self, left), right, getattr(self, right)

    @property
    def pairs(self) -> set[Pair]:
        return set(itertools.starmap(self.pair, itertools.combinations(vars(self), 2)))


COLUMNS = {"curvature": CURVATURES, "terminal": TERMINALS, "form": FORMS, "network": NETWORKS, "schedule": SCHEDULES,
           "extra": EXTRAS}  # fmt: skip
USUAL = {"curvature": ("sgd", "kfac"), "terminal": ("gradient",), "form": ("joint", "nonlinear"), "network": ("mlp",),
         "schedule": ("asap",), "extra": ("plain",)}  # fmt: skip


def meeting() -> dict[Pair, Row]:
    """Every two entries that may meet, with a row in which they do."""
    found: dict[Pair, Row] = {}
    for (left, right), usual in ((pair, dict(USUAL)) for pair in itertools.combinations(COLUMNS, 2)):
        for a, b in itertools.product(COLUMNS[left], COLUMNS[right]):
            rows = itertools.starmap(Row, itertools.product(*(usual | {left: (a,), right: (b,)}).values()))
            row = next((row for row in rows if row.is_allowed), None)
            if row is not None:
                found[row.pair(left, right)] = row
    return found


def table() -> list[Row]:
    """Greedy: each row takes what has met the fewest of the others; what has not met then gets a row of its own."""
    rows: list[Row] = []
    met: set[Pair] = set()
    rest = list(itertools.product(NETWORKS, SCHEDULES, EXTRAS))
    for number, (metric, *fixed) in enumerate(itertools.product(METRICS, TERMINALS, FORMS)):
        some = [rest[(131 * number + 37 * offset) % len(rest)] for offset in range(150)]
        candidates = (Row(name, *fixed, *own) for own in some for name in METRICS[metric])
        rows.append(max((row for row in candidates if row.is_allowed), key=lambda row: len(row.pairs - met)))
        met |= rows[-1].pairs
    for pair, row in meeting().items():
        if pair not in met:
            rows.append(row)
            met |= row.pairs
    return rows


@functools.cache
def compiled(row: Row) -> Run:
    """The row's program after some steps."""
    return train(row.case, **row.options)
