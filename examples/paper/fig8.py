"""Fig. 6a, 6b and 8: training curves, and the variance over seeds at three learning rates of every base method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import table2
from shared import BASES, FORMS, SETTINGS, Row, figure, markdown, save, variance_change

RESULTS = "runs"
work = table2.work


def jobs(rows: Sequence[Row]) -> list[Row]:
    """Table 2's runs at two other rates too, on the first data set."""
    return [job for job in table2.jobs(rows, table2.FACTORS) if job["dataset"] == SETTINGS.datasets[0]]


def changes(rows: Sequence[Row], name: str, form: str, what: str) -> dict[tuple[str, str], tuple[float, ...] | None]:
    """By base and rate: the change of the variance in percent with its interval; None where a run diverged."""
    found: dict[tuple[str, str], tuple[float, ...] | None] = {}
    for base in BASES:
        for factor in table2.FACTORS:
            lr = table2.rate(rows, name, base, factor)
            runs = [table2.reported(rows, dataset=name, base=base, form=f, lr=lr) for f in (form, "base")]
            done = sorted({row["seed"] for row in runs[0]} & {row["seed"] for row in runs[1]})
            sides = [table2.by_seed(side, what) for side in runs]
            if len(done) > 2:
                whole = all(seed in side for side in sides for seed in done)
                both = ([side[seed] for seed in done] for side in sides)
                found[base, lr] = (*variance_change(*both), len(done)) if whole else None
    return found


def shown(change: tuple[float, ...] | None) -> str:
    """A change with its interval, bold where it excludes zero; of few seeds no interval, which would say nothing."""
    if change is None:
        return "a run diverged"
    if change[3] < 6:
        return f"{change[0]:+.0f} ({change[3]} seeds)"
    text = f"{change[0]:+.0f} ({change[1]:+.0f} to {change[2]:+.0f})"
    return f"**{text}**" if change[1] * change[2] > 0 else text


def table(rows: Sequence[Row], name: str) -> str:
    """Percent by base and rate, of both forms, for train loss and accuracy."""
    columns = [changes(rows, name, form, what) for what in ("train_loss", "accuracy") for form in ("paper", "ours")]
    header = ("base", "lr", "loss: paper's form", "loss: ours", "accuracy: paper's form", "accuracy: ours")
    return markdown(
        header, [[*at, *(shown(column[at]) if at in column else "–" for column in columns)] for at in columns[0]]
    )


def curves(rows: Sequence[Row], name: str, folder: Path) -> str:
    """The batch's loss of every base method and its forms: median over seeds, lowest and highest."""
    made, axes = figure(4, width=3.2)
    for axis, base in zip(axes[0], BASES, strict=True):
        lr = table2.rate(rows, name, base)
        for form, color in zip(FORMS, ("black", "C1", "C0"), strict=True):
            found = table2.reported(rows, dataset=name, base=base, form=form, lr=lr)
            points = list(zip(*([float(v) for v in row["curve"].split()] for row in found), strict=True))[:20]
            at = [max(1, int(found[0]["steps"]) // 20) * (k + 0.5) for k in range(len(points))]
            axis.plot(at, [statistics.median(column) for column in points], color=color, label=form)
            axis.fill_between(at, *([pick(column) for column in points] for pick in (min, max)), color=color,
                              alpha=0.15, linewidth=0)  # fmt: skip
        axis.set(title=f"{base}, lr {lr}", xlabel="step", yscale="log", ylim=(1e-3, 10))
    axes[0][0].set_ylabel("loss of the batch before the step")
    axes[0][0].legend()
    return save(made, folder, "fig6a")


def parts(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """The curves, the table and a bar a rate."""
    name = next(iter(dict.fromkeys(row["dataset"] for row in rows)))
    made, axes = figure(2, width=4.6)
    for axis, form in zip(axes[0], ("paper", "ours"), strict=True):
        found = {at: change for at, change in changes(rows, name, form, "train_loss").items() if change}
        axis.barh(range(len(found)), [change[0] for change in found.values()], color="C0")
        axis.set_yticks(range(len(found)), [f"{base}, {lr}" for base, lr in found])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title={"paper": "the paper's form", "ours": "ours"}[form], xlabel="variance of the train loss, %")
        axis.invert_yaxis()
    return {"fig6a": curves(rows, name, folder), "fig8": f"{save(made, folder, 'fig8')}\n\n{table(rows, name)}"}
