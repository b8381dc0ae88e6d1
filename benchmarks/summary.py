"""The first thing that README.md says and shows, from the rows of ``study.csv``.

python benchmarks/summary.py    rewrites the sections between markers of README.md and docs/index.md, and docs/gain.svg
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common import DOCS, save_svg, write_section
from study_methods import DEFAULT
from study_runs import Runs, final, load, median
from study_tasks import TASKS
from time_to_target import best_rival, making, missed, pairs, speedup, standing, verdict

README, INDEX, PICTURE = DOCS.parent / "README.md", DOCS / "index.md", DOCS / "gain.svg"
CLAIMED = "digits-128"
"""The task that the first claim is about."""
EDGE = 16.0
"""Where the picture ends, and stands for infinity."""


@dataclass(frozen=True)
class Row:
    """A task: the rival's time and steps over ours, empty where a side did not reach the target.

    Attributes:
        time, steps: :func:`time_to_target.speedup`.
        ahead: whether it is above 1, or the rival missed the target.
        verdict: :func:`time_to_target.verdict`, of time.
        made: whether it is ahead with the making of the step counted in.
    """

    task: str
    rival: str
    time: tuple[float, ...]
    steps: tuple[float, ...]
    ahead: bool
    verdict: str
    made: bool

    def words(self) -> tuple[str, str]:
        """What the picture writes on the left and on the right."""
        return (
            f"{self.task}, {self.rival}",
            f"{self.time[0]:.2f}" if self.time else f"{'rival' if self.ahead else 'default'} misses",
        )

    @property
    def place(self) -> float:
        """Where it is drawn: at the edge where a side missed the target in some seed."""
        return self.time[0] if self.time else EDGE if self.ahead else 1 / EDGE


def rows(runs: Runs) -> list[Row]:
    """Every task that the default and a rival were run on, the largest gain in time first."""
    found = []
    for task, mine, (method, theirs) in pairs(runs):
        time, steps, made = (
            speedup(mine, theirs, of, more)
            for of, more in (("seconds_to", 0.0), ("steps_to", 0.0), ("seconds_to", making(mine)))
        )
        ahead, made_ahead = (ratio[0] > 1 if ratio else not missed(mine) for ratio in (time, made))
        name = method.name.removeprefix("torch ")
        found.append(Row(task.name, name, time, steps, ahead, verdict(mine, theirs), made_ahead))
    return sorted(found, key=lambda row: row.place, reverse=True)


def draw(found: list[Row], path: Path) -> None:
    """A line a task: time as a dot with its interval, steps as a ring; right of 1 the default is sooner."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 9.5})
    figure = Figure(figsize=(8.2, 0.27 * len(found) + 1.1), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color="#5c6878", lw=1)
    for place, row in enumerate(found):
        colour = "#c2185b" if row.ahead else "#5c6878"
        axes.plot(row.time[1:], [place] * len(row.time[1:]), color=colour, lw=2, alpha=0.45)
        axes.plot(
            row.place,
            place,
            "o" if row.time else ">" if row.ahead else "<",
            color=colour,
            label="processor time" if place == len(found) - 1 else None,
        )
        if row.steps:
            axes.plot(
                row.steps[0], place, "o", mfc="none", color=colour, label="steps" if place == len(found) - 1 else None
            )
    words = list(zip(*(row.words() for row in found), strict=True))
    axes.set(xscale="log", xlim=(1 / EDGE, EDGE * 1.15), ylim=(len(found) - 0.4, -0.6))
    axes.set(yticks=range(len(found)), yticklabels=words[0], xticks=[1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8],
             xticklabels=["⅛", "¼", "½", "1", "2", "4", "8"])  # fmt: skip
    axes.minorticks_off()
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(found)), words[1])
    axes.tick_params(axis="y", length=0)
    right.tick_params(axis="y", length=0)
    axes.set_xlabel("best tuned rival's over ours: right of 1, the target is reached sooner with nothing tuned")
    axes.grid(axis="x", alpha=0.25)
    for side in (*axes.spines.values(), *right.spines.values()):
        side.set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    save_svg(figure, path)


def claim(runs: Runs) -> str:
    """One task in words, and what the picture of all of them shows."""
    task, found = TASKS[CLAIMED], rows(runs)
    ours, rival = final(runs, task, DEFAULT), best_rival(runs, task)
    assert rival is not None
    name, theirs = rival[0].name.removeprefix("torch "), rival[1]
    took = [making(final(runs, TASKS[row.task], DEFAULT)) for row in found]
    ahead = sum(row.ahead for row in found)
    sure, lost = (sum(row.verdict == word for row in found) for word in ("ahead", "behind"))
    return (
        f"On the paper's own network, batch 128, it reaches a train loss of {task.target} in "
        f"**{median(ours, 'steps_to'):g} steps** with nothing tuned where {name} with its best "
        f"learning rate takes {median(theirs, 'steps_to'):g}, in {median(ours, 'seconds_to'):.2f} s of processor time "
        f"against {median(theirs, 'seconds_to'):.2f} s, and ends at a validation accuracy of "
        f"{median(ours, 'accuracy'):.1%} against {median(theirs, 'accuracy'):.1%} (seeds: {len(ours)}, medians).\n\n"
        "![How much sooner each task's target is reached than by its best tuned rival](docs/gain.svg)\n\n"
        f"Written and drawn by `benchmarks/summary.py`. In processor time it is ahead on {ahead} of {len(found)} "
        f"tasks, on {sure} of them with the whole 95 % interval or because the best rival misses the target in some "
        f"seed; on {lost} it is behind in that way. A dot without a line is one seed. Making the step is not counted: "
        f"{min(filter(None, took)):.1f} to {max(took):.1f} s here, as long as some of these runs "
        "([docs/time-to-target.md](docs/time-to-target.md) has both)."
    )


def use(runs: Runs) -> str:
    """Where it is ahead and where it is not, for the pages that say when to use it."""
    found, stands = rows(runs), ";\n".join(f"- {line}" for line in standing(runs))
    slower = sum(not row.made for row in found)
    return (
        f"Against the best rival tuned for each task ([what the names stand for]([TASKS]#tasks)), in processor time to"
        " the target, making the step not counted, the default is (in parentheses the rival's time over ours)\n\n"
        f"{stands}.\n\nWith making the step counted in, the tuned rival is there sooner on {slower} of these "
        f"{len(found)} small tasks: their runs are over in seconds."
    )


def linked(text: str, page: str) -> str:
    """With docs/time-to-target.md as a page links to it."""
    return text.replace("[TASKS]", page)


def write(runs: Runs) -> None:
    """The sections of README.md and docs/index.md."""
    write_section("claim", claim(runs), README)
    write_section("use", linked(use(runs), "docs/time-to-target.md"), README)
    write_section("use", linked(use(runs), "time-to-target.md"), INDEX)


if __name__ == "__main__":
    runs = load()
    write(runs)
    draw(rows(runs), PICTURE)
