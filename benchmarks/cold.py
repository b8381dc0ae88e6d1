"""Processor time to make a compiled step in a new process, beyond what any optimizer of torch.optim costs there.

``python benchmarks/cold.py TASK METHOD`` prints it as JSON: importing gtddp_compile, and compiling. Before the clock
starts, torch.optim has made and used an optimizer, which imports much of torch that no step needs (``torch._dynamo``).
``python benchmarks/cold.py`` measures it again for the default's rows of ``study.csv``, and leaves the rest as it is.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import replace

import torch
from torch import nn


def use_torch_optim() -> None:
    """A step of SGD."""
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 1)).sum().backward()
    optimizer.step()


def again() -> None:
    """The default's rows of the first seed, and the page."""
    from study_methods import DEFAULT
    from study_runs import RAW, Study, cold_seconds, load
    from time_to_target import write_page

    study = Study(RAW, load())
    for run in [run for run in study.runs.values() if run.method == DEFAULT.name and run.seed == 0]:
        seconds = cold_seconds(run)
        study.keep(replace(load()[run.key], cold_s=seconds))  # another process may have timed its steps meanwhile
        print(f"{run.task}, {run.method}: {seconds:.2f} s", flush=True)
    write_page(load())


def main(task: str, method: str) -> None:
    """Measure it."""
    torch.set_num_threads(1)
    use_torch_optim()
    start = time.process_time()
    import gtddp_compile  # noqa: F401  # timed

    imported = time.process_time() - start
    from study_runs import Run, Training
    from study_tasks import TASKS

    run, data = Run(task, method, 0.0, "constant", 0), TASKS[task].load()
    gc.collect()  # what loading the data has left is not ours
    Training(run, TASKS[task], data)
    print(json.dumps({"cold_s": imported + run.compile_s}))


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] else again()
