"""Fig. 6c: the leading directions of a feedback matrix, projected to image space (6a and 6b are with Fig. 8)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from shared import FORMS, LOSS, PaperNet, Row, figure, load, markdown, save
from torch import Tensor

from gtddp_compile import compile_optimizer

RESULTS = "modes"
MODES, LR = 4, 0.1


def jobs(rows: Sequence[Row]) -> list[Row]:
    """One network, by the paper's form and by ours."""
    return [{"form": form, "steps": "100", "width": "4", "seed": "0"} for form in ("paper", "ours")]


def work(job: Row) -> Row:
    """Train a little by SGD; modes of the second convolution for an image of each class.

    The directions, ``(k, 10, width, 8, 8)``, are pulled back through the first convolution by its transposed Jacobian.
    """
    torch.manual_seed(int(job["seed"]))
    (x, y), _ = load("digits", None)
    model = PaperNet((1, 8, 8), 1, int(job["width"]))
    base = compile_optimizer(model, x[:32], loss=LOSS, curvature="sgd", lr=LR, feedback=False)
    for rows in torch.randint(len(y), (int(job["steps"]), 32)):
        base.step(x[rows], y[rows])
    one = torch.stack([x[y == label][0] for label in range(10)])
    optimizer = compile_optimizer(model, one, loss=LOSS, curvature="sgd", lr=LR, **FORMS[job["form"]])
    values, directions = optimizer.feedback_modes("convs.1", one, torch.arange(10), k=MODES)
    (states,) = directions.values()
    _, back = torch.func.vjp(lambda images: torch.relu(model.convs[0](images)), one)
    images = torch.stack([back(state.float())[0].detach()[:, 0] for state in states])
    images = images / images.abs().amax((1, 2, 3), keepdim=True)
    share = states.flatten(2).norm(dim=2)
    return {
        "values": " ".join(f"{value:.4g}" for value in values.tolist()),
        "share": " ".join(f"{value:.2f}" for value in share.flatten().tolist()),
        "images": " ".join(f"{value:.2g}" for value in images.flatten().tolist()),
    }


def numbers(row: Row, name: str, *shape: int) -> Tensor:
    """A list of a row as a tensor."""
    return torch.tensor([float(value) for value in row[name].split()]).reshape(shape)


def table(rows: Sequence[Row]) -> str:
    """Every image's share of a direction's length."""
    lines = [(row["form"], str(n + 1), row["values"].split()[n], *(f"{share:.2f}" for share in shares))
             for row in rows for n, shares in enumerate(numbers(row, "share", MODES, 10).tolist())]  # fmt: skip
    return markdown(("form", "mode", "singular value", *map(str, range(10))), lines)


def parts(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """The pictures and the table."""
    (x, y), _ = load("digits", None)
    one = torch.stack([x[y == label][0, 0] for label in range(10)])
    shown = []
    for row in rows:
        images = numbers(row, "images", MODES, 10, 8, 8)
        drawn, cells = figure(10, MODES + 1, 0.8, 0.8)
        for line, pictures in zip(cells, (one, *images), strict=True):
            signed = pictures is not one
            for axis, picture in zip(line, pictures, strict=True):
                axis.imshow(picture, cmap="RdBu" if signed else "gray", vmin=-1 if signed else 0, vmax=1)
                axis.set_axis_off()
        shown.append(f"{row['form']}:\n\n{save(drawn, folder, 'fig6c-' + row['form'])}")
    return {"fig6c": "\n\n".join([*shown, table(rows)])}
