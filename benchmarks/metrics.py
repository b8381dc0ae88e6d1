"""A first look at Shampoo's, SOAP's and Muon's metrics: steps to a train loss of 0.05, alone and in the joint step.

One seed, three learning rates a metric by a factor of 10 (alone: of 3), the default's aim and inertia in the joint step
and no momentum of their own there. Finished runs are rows of ``metrics.csv`` and not run again; the section "Metrics"
of docs/research.md is written from it.

    python benchmarks/metrics.py                digits-128 and vit-64, what is missing of them
    python benchmarks/metrics.py digits-128     one of them
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import DOCS, markdown, write_section
from study_methods import DEFAULT, METHODS, ours
from study_runs import SWEEP_SEED, Runs, Study, load
from study_tasks import TASKS

from gtddp_compile.options import SUGGESTED

RAW = Path(__file__).with_name("metrics.csv")
LOOKED_AT = ("digits-128", "vit-64")
JOINT = {"inertia": SUGGESTED["foof"]["inertia"], "terminal": SUGGESTED["foof"]["terminal"]}
AVERAGED = {"curvature": "shampoo", "stat_decay": 0.95}
MUON = {"curvature": "muon", "momentum": 0.0, "stat_momentum": 0.9, "betas": (0.0, 0.999)}
LOOKS = (
    DEFAULT,
    ours("shampoo", 0.03, 0.1, 0.3, **AVERAGED, feedback=False),
    ours("shampoo, joint", 0.1, 1.0, 10.0, **AVERAGED, **JOINT),
    ours("soap", 0.003, 0.01, 0.03, curvature="soap", feedback=False),
    ours("soap, joint", 0.01, 0.1, 1.0, curvature="soap", betas=(0.0, 0.95), **JOINT),
    ours("soap, joint, eps 1e-3", 0.1, 1.0, curvature="soap", betas=(0.0, 0.95), eps=1e-3, **JOINT),
    ours("muon", 0.01, 0.03, 0.1, curvature="muon", feedback=False),
    ours("muon, joint", 0.01, 0.03, 0.1, **MUON, **JOINT),
    ours("muon, joint, damping 0.1", 0.01, 0.03, 0.1, **MUON, **JOINT, damping=0.1),
)


def section(runs: Runs) -> str:
    """A table of steps by learning rate, every row a metric on a task."""
    rows = []
    for task in LOOKED_AT:
        for method in LOOKS:
            found = [runs.get((task, method.name, rate, "constant", SWEEP_SEED)) for rate in method.rates or (0.0,)]
            known = [run for run in found if run is not None]
            if known:
                best = min(known, key=lambda run: (run.steps_to, run.train_loss))
                steps = "; ".join(f"{run.rate:g}: {run.steps_to:g}" for run in known).replace("inf", "–")
                rows.append([task, method.name, steps.removeprefix("0: "), f"{best.train_loss:.3f}",
                             f"{best.best_accuracy:.1%}"])  # fmt: skip
    header = ("task, batch", "metric", "learning rate: steps", "best one's train loss", "its best validation")
    said = "Steps to a train loss of 0.05 by learning rate. One seed, and a run ends at the target or, with a dash,\n" \
           "when another rate of its row has been there in fewer steps."  # fmt: skip
    return f"## Metrics\n\n{said}\n\n{markdown(header, rows)}"


def main() -> None:
    """What is missing, then the section."""
    METHODS.update({method.name: method for method in LOOKS})
    study = Study(RAW, load(RAW))
    for task in sys.argv[1:] or LOOKED_AT:
        for method in LOOKS:
            study.take_turns(TASKS[task], [(method, rate, "constant", SWEEP_SEED) for rate in method.rates or (0.0,)])
    write_section("metrics", section(study.runs), DOCS / "research.md")


if __name__ == "__main__":
    main()
