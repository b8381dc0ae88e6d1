"""Inputs as tokenizers and collators return them: a dict by the names of forward's arguments, labels among them."""

import copy
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import compile_optimizer
from support.compared import torch_step
from support.refused import refused

LABELS = torch.arange(6) % 3


class Encoder(nn.Module):
    """Arguments in the order of many language models, all but the first may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.out = nn.Embedding(9, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.kinds = nn.Embedding(2, 5)
        self.last: Any = None

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, kinds: Tensor | None = None, *, scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        h = self.table(ids) if kinds is None else self.table(ids) + self.kinds(kinds)
        h = torch.tanh(self.fc(h))
        h = h.mean(1) if mask is None else (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        self.last = h.detach()
        return {"logits": self.out(h if scale is None else h * scale), "hidden": h}


def loss(outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs["logits"], labels, reduction="none")


def given(*names: str, seed: int = 0) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    ids, kinds = torch.randint(9, (6, 4), generator=source), torch.randint(2, (6, 4), generator=source)
    scale = torch.rand(6, 1, generator=source, dtype=torch.float64)
    every = {"kinds": kinds, "ids": ids, "mask": (ids > 0).double(), "scale": scale}
    return {name: every[name] for name in names}


@pytest.mark.parametrize("names", [("ids",), ("mask", "ids"), ("kinds", "ids"), ("scale", "ids", "kinds")], ids=str)
@pytest.mark.parametrize("labels_inside", [False, True])
def test_a_step_by_name(names: tuple[str, ...], labels_inside: bool) -> None:
    torch.manual_seed(0)
    model = Encoder().double()
    plain = copy.deepcopy(model)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.5)
    options: dict[str, Any] = {"loss": loss, "curvature": "sgd", "lr": 0.5, "feedback": False}
    opt = compile_optimizer(model, given(*names), **options)
    code = opt.program.code
    for seed in range(3):
        inputs = given(*names, seed=seed)
        torch_step(sgd, loss(plain(**inputs), LABELS).mean())
        if labels_inside:
            opt.step(UserDict({**inputs, "labels": LABELS, "missing": None}))
        else:
            opt.step(inputs, LABELS)
    assert opt.program.code == code and model.last is None
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


def test_names_and_positions_are_one() -> None:
    model = Encoder().double()
    opt = compile_optimizer(model, given("ids", "mask"), loss=loss, curvature="sgd", line_search=(0.5, 1.0))
    code, inputs = opt.program.code, given("mask", "ids")
    opt.step((inputs["ids"], inputs["mask"]), LABELS)
    assert opt.program.code == code
    opt.step(given("ids", "kinds"), LABELS)
    assert opt.graph.ops.inputs == ("ids", "kinds")
    opt = compile_optimizer(model, loss=loss, curvature="sgd")
    opt.accumulate({**given("ids", "kinds"), "labels": LABELS}, None)
    opt.step(given("ids", "kinds"), LABELS)


def test_names_tell_recordings_apart() -> None:
    """The first arguments, after another one by name: as many inputs, of another meaning."""
    torch.manual_seed(0)
    model = Encoder().double()
    plain = copy.deepcopy(model)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.5)
    opt = compile_optimizer(model, given("ids", "kinds"), loss=loss, curvature="sgd", lr=0.5, feedback=False)
    inputs = given("ids", "mask")
    torch_step(sgd, loss(plain(**inputs), LABELS).mean())
    opt.step(inputs, LABELS)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


class Optional(nn.Module):
    """An argument that may be ``None`` in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, gate: Tensor | None, mask: Tensor | None = None, gain: Any = 1.0) -> Tensor:
        h = torch.tanh(self.fc(x) if gate is None else self.fc(x) * gate)
        return self.out(h if mask is None else h * mask) * gain


@pytest.mark.parametrize("places", ["x--", "xg-", "x-m", "xgm", "x-"])
def test_none_in_a_tuple_is_a_constant(places: str) -> None:
    torch.manual_seed(0)
    model = Optional().double()
    plain = copy.deepcopy(model)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.5)
    draw = {"x": (6, 4), "g": (6, 1), "m": (6, 5)}
    inputs = tuple(None if key == "-" else torch.rand(draw[key], dtype=torch.float64) for key in places)
    opt = compile_optimizer(model, inputs, loss=nn.CrossEntropyLoss(), curvature="sgd", lr=0.5, feedback=False)
    for _ in range(2):
        torch_step(sgd, F.cross_entropy(plain(*inputs), LABELS))
        opt.step(inputs, LABELS)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


def test_none_that_cannot_be_left_out() -> None:
    x = torch.rand(6, 4, dtype=torch.float64)
    opt = compile_optimizer(Optional().double(), loss=nn.CrossEntropyLoss())
    refused(lambda: opt.step((x, None, None, None), LABELS), "argument 'gain' has another default", "Leave it out")
    opt = compile_optimizer(nn.Sequential(nn.Linear(4, 3)).double(), loss=nn.CrossEntropyLoss())
    refused(lambda: opt.step((x, None), LABELS), "forward names fewer arguments", "Leave it out")


def test_names_that_the_model_does_not_take() -> None:
    model = Encoder().double()
    opt = compile_optimizer(model, loss=loss, curvature="sgd")
    refused(lambda: opt.step({"ids": given("ids")["ids"], "word": LABELS}, LABELS), "no argument 'word'", "ids, mask")
    refused(lambda: opt.step({"ids": [1, 2]}, LABELS), "got list", "dict of them by name")
    refused(lambda: opt.step({}, LABELS), "there are no inputs")
