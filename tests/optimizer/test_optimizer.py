"""A compiled optimizer behaves as a torch.optim.Optimizer, and a step is a transaction."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, CompileError, compile_optimizer
from support import networks
from support.compared import TORCH, torch_step
from support.noisy import LOSS, Noisy, batch


def test_buffers_advance_once_and_random_numbers_are_drawn_once() -> None:
    model = Noisy()
    plain = copy.deepcopy(model)
    opt = compile_optimizer(model, batch()[0], loss=LOSS, curvature="sgd", lr=0.1)
    torch.manual_seed(3)
    opt.step(*batch())
    after = torch.get_rng_state()
    torch.manual_seed(3)
    plain(batch()[0])
    assert torch.equal(after, torch.get_rng_state())
    assert all(map(torch.equal, model.buffers(), plain.buffers()))


def test_a_function_as_loss_may_do_without_targets() -> None:
    case = networks.mlp()
    x = case.batch(0)[0]
    opt = compile_optimizer(copy.deepcopy(case.model), x, loss=lambda y, _: y.square().mean(1), curvature="sgd", lr=0.1)
    assert opt.accumulate(x, None) == opt.step(x)


def test_layers_that_are_trained_later() -> None:
    """As in torch.optim, a frozen backbone has its options and its scheduler from the beginning."""
    case = networks.mlp()
    model, plain = copy.deepcopy(case.model), copy.deepcopy(case.model)
    for one in (model, plain):
        next(one.children()).requires_grad_(False)
    opt = compile_optimizer(model, case.batch(0)[0], loss=LOSS, curvature="adam", lr=0.1, feedback=False)
    adam = torch.optim.Adam(plain.parameters(), lr=0.1)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (opt, adam)]
    assert [group.name for group in opt.program.setting.groups] == [p.name for p in opt.graph.players]  # type: ignore[union-attr]
    for index in range(4):
        if index == 2:
            for one in (model, plain):
                one.requires_grad_(True)
        x, y = case.batch(index)
        opt.step(x, y)
        torch_step(adam, LOSS(plain(x), y))
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


def test_groups_can_be_divided() -> None:
    """No weight decay for biases: options are taken parameter by parameter."""
    case = networks.mlp()
    model, plain = copy.deepcopy(case.model), copy.deepcopy(case.model)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3}
    opt = compile_optimizer(model, case.batch(0)[0], loss=LOSS, curvature="adamw", feedback=False, **options)
    for group in list(opt.param_groups):
        biases = [p for p in group["params"] if p.ndim < 2]
        group["params"] = [p for p in group["params"] if p.ndim >= 2]
        opt.param_groups.append({**group, "params": biases, "weight_decay": 0.0, "name": group["name"] + ".bias"})
    halves = [{"params": [p for p in plain.parameters() if (p.ndim < 2) == low]} for low in (False, True)]
    halves[1]["weight_decay"] = 0.0  # type: ignore[assignment]
    adamw = torch.optim.AdamW(halves, **options)
    opt.load_state_dict(opt.state_dict())
    for index in range(3):
        x, y = case.batch(index)
        opt.step(x, y)
        torch_step(adamw, LOSS(plain(x), y))
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [
    {}, {"inertia": 0.9, "max_step": 0.1}, {"curvature": "kfac", "coupling": 3}, {"curvature": "muon"},
    {"terminal": "ggn"}, {"curvature": "adam", "feedback": False},
], ids=str)  # fmt: skip
def test_rates_of_zero(options: dict[str, Any]) -> None:
    """No step, in either backend; of one layer, or later, nothing but what inertia carries on."""
    found = []
    for backend in ("fast", "dense"):
        still, case = networks.mlp(), networks.mlp()
        opt = compile_optimizer(still.model, still.batch(0)[0], loss=LOSS, backend=backend, **options)
        for group in opt.param_groups:
            group["lr"] = 0.0
        before = copy.deepcopy(still.model.state_dict())
        for index in range(2):
            opt.step(*still.batch(index))
        assert all(map(torch.equal, before.values(), still.model.state_dict().values()))
        opt = compile_optimizer(case.model, case.batch(0)[0], loss=LOSS, backend=backend, **options)
        opt.param_groups[1]["lr"] = 0.0
        for index in range(4):
            if index == 2:
                for group in opt.param_groups:
                    group["lr"] = 0.0
            opt.step(*case.batch(index))
        found.append(case.model.state_dict())
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def test_groups_of_something_else_are_refused() -> None:
    """States of something else: tests/docs/test_errors_page.py."""
    model = Noisy()
    opt = compile_optimizer(model, batch()[0], loss=LOSS, curvature="adam")
    halves = [{"params": [p]} for p in model.parameters()]
    with pytest.raises(CompileError, match="6 parameter groups of 6 parameters without names"):
        opt.load_state_dict(torch.optim.Adam(halves).state_dict())
    named = list(model.named_parameters())
    halves = [{"params": named[::2]}, {"params": named[1::2], "lr": 0.5}]
    with pytest.raises(CompileError, match="other options for some parameters of module 'fc'"):
        opt.load_state_dict(torch.optim.Adam(halves).state_dict())
    assert torch.isfinite(opt.step(*batch()))


def test_divided_groups_are_divided_again_before_their_state_is_loaded() -> None:
    """The recipe of docs/usage.md for no decay of biases, and its resumption."""

    def made(model: nn.Module) -> CompiledOptimizer:
        return compile_optimizer(model, batch()[0], loss=LOSS, curvature="adamw", lr=0.01)

    def divide(opt: CompiledOptimizer) -> None:
        for group in list(opt.param_groups):
            plain = [p for p in group["params"] if p.ndim < 2]
            group["params"] = [p for p in group["params"] if p.ndim >= 2]
            opt.param_groups.append({**group, "params": plain, "weight_decay": 0.0, "name": group["name"] + ".plain"})

    model = Noisy()
    opt = made(model)
    divide(opt)
    opt.step(*batch())
    resumed = made(twin := copy.deepcopy(model))
    with pytest.raises(CompileError, match="divide this optimizer's groups as they were"):
        resumed.load_state_dict(opt.state_dict())
    divide(resumed)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for one in (opt, resumed):
        torch.manual_seed(1)
        one.step(*batch())
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_loss_that_reads_parameters_is_refused() -> None:
    model = Noisy()

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none") + model.fc.weight.abs().sum()

    opt = compile_optimizer(model, batch()[0], loss=penalised, curvature="sgd")
    with pytest.raises(CompileError, match=r"reads trained parameters itself, fc\.weight"):
        opt.step(*batch())
    model.fc.weight.requires_grad_(False)
    assert torch.isfinite(opt.step(*batch()))


class Tagger(nn.Module):
    """A conditional random field: transitions that only its loss reads, unless it returns them."""

    def __init__(self, returned: bool = False) -> None:
        super().__init__()
        self.out, self.transitions, self.returned = nn.Linear(3, 2), nn.Parameter(torch.eye(2)), returned
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Any:
        scores = self.norm(self.out(x).transpose(1, 2)).transpose(1, 2)
        return (scores, self.transitions.expand(len(x), 2, 2)) if self.returned else scores

    def loss(self, outputs: Any, tags: Tensor) -> Tensor:
        scores, transitions = outputs if self.returned else (outputs, self.transitions.expand(len(outputs), 2, 2))
        one, alpha = torch.arange(len(scores)), scores[:, 0]
        path = scores[one, 0, tags[:, 0]]
        for t in range(1, scores.shape[1]):
            alpha = torch.logsumexp(alpha[:, :, None] + transitions, 1) + scores[:, t]
            path = path + transitions[one, tags[:, t - 1], tags[:, t]] + scores[one, t, tags[:, t]]
        return torch.logsumexp(alpha, 1) - path


def test_what_only_the_loss_reads_is_refused_and_trained_where_forward_returns_it() -> None:
    x, tags = torch.randn(5, 4, 3), torch.randint(2, (5, 4))
    tagger = Tagger()
    with pytest.raises(
        CompileError, match=r"Tagger\.loss reads .*, transitions: .* part of forward: .*return p\.expand"
    ):
        compile_optimizer(tagger, x, loss=tagger.loss).step(x, tags)
    ours, theirs = Tagger(returned=True), Tagger(returned=True)
    theirs.load_state_dict(ours.state_dict())
    opt = compile_optimizer(ours, x, loss=ours.loss, curvature="sgd", lr=0.1, feedback=False)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for _ in range(3):
        opt.step(x, tags)
        torch_step(sgd, theirs.loss(theirs(x), tags).mean())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


class Scaled(nn.CrossEntropyLoss):
    """A module with ``reduction``, of the user's own, which reads what is not its own."""

    def __init__(self, by: list[Tensor]) -> None:
        super().__init__()
        self.by = by

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input * self.by[0] if self.by else input, target)


def test_what_a_loss_reads_of_others_is_named_and_has_no_gradient() -> None:
    """A discriminator has an optimizer of its own; a temperature that nobody trains was forgotten."""
    temperature = nn.Parameter(torch.ones(()))
    tempered = lambda y, t: nn.functional.cross_entropy(y * temperature, t, reduction="none")  # noqa: E731
    opt = compile_optimizer(Noisy(), batch()[0], loss=tempered)
    with pytest.warns(UserWarning, match=r"reads tensors \(\) that require a gradient and are no parameters of the"):
        opt.step(*batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(*batch())
    assert temperature.grad is None and float(temperature.detach()) == 1.0


@pytest.mark.parametrize("read", ["the model's", "the targets"])
@pytest.mark.parametrize("kind", [Scaled, "a function"])
@pytest.mark.parametrize("options", [
    {}, {"curvature": "adam", "feedback": False}, {"backend": "dense"}, {"rollout": "nonlinear"},
    {"line_search": (0.5, 1.0)},
], ids=str)  # fmt: skip
def test_a_loss_that_begins_to_read_parameters_is_refused_then(options: Any, kind: Any, read: str) -> None:
    """Nothing of that step is done; the others are."""
    torch.manual_seed(0)
    model, by = Noisy(), list[Tensor]()
    loss = Scaled(by)
    if kind != Scaled:
        function = nn.functional.cross_entropy
        loss = lambda y, t: function(y * by[0] if by else y, t, reduction="none")  # type: ignore[assignment]  # noqa: E731
    opt = compile_optimizer(model, batch()[0], loss=loss, **options)
    opt.step(*batch())
    before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"], torch.get_rng_state()))
    by.append(model.fc.bias[0] if read == "the model's" else torch.ones(()))
    if read == "the targets":  # which are data, whatever they require
        assert torch.isfinite(opt.step(batch()[0], nn.functional.one_hot(batch()[1], 3).float().requires_grad_()))
        return
    with pytest.raises(CompileError, match=r"fc\.bias"):
        opt.step(*batch(1))
    torch.testing.assert_close(
        before, (model.state_dict(), opt.state_dict()["state"], torch.get_rng_state()), rtol=0, atol=0
    )
    by[:] = [by[0].detach()]
    assert torch.isfinite(opt.step(*batch(1)))


def test_a_function_as_loss_is_called_once_a_step() -> None:
    """One that keeps a count, or a centre of what it was shown, is no other than in a loop of torch's."""
    calls = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(outputs))
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    opt = compile_optimizer(Noisy(), batch()[0], loss=loss)
    for step in range(3):
        opt.step(*batch(step))
    assert len(calls) == 3


METHODS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 0.01, "amsgrad": True}, "adamw": {"lr": 0.01}, "rmsprop": {"lr": 0.01, "centered": True},
    "sgd": {"lr": 0.1, "momentum": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("given", ["parameters", "named_parameters", "trained", "two groups"])
@pytest.mark.parametrize("curvature", METHODS)
def test_states_of_torch_go_on_here_and_ours_there(curvature: str, given: str) -> None:
    case, kind = networks.mlp(), TORCH[curvature]
    plain, model = copy.deepcopy(case.model), copy.deepcopy(case.model)
    for one in (plain, model):
        next(one.parameters()).requires_grad_(given != "trained")
    named = list(plain.named_parameters())
    groups: Any = {
        "parameters": plain.parameters(), "named_parameters": reversed(named),
        "trained": [p for p in plain.parameters() if p.requires_grad],
        "two groups": [{"params": named[2:]}, {"params": named[:2], "lr": 0.02}],
    }[given]  # fmt: skip
    theirs = kind(groups, **METHODS[curvature])

    def step(optimizer: torch.optim.Optimizer, index: int) -> None:
        x, y = case.batch(index)
        torch_step(optimizer, LOSS(plain(x), y))

    step(theirs, 0)
    model.load_state_dict(plain.state_dict())
    opt = compile_optimizer(model, case.batch(0)[0], loss=LOSS, curvature=curvature, feedback=False, lr=0.3)
    opt.load_state_dict(copy.deepcopy(theirs.state_dict()))  # as torch's, it takes tensors as they are
    for index in (1, 2):
        opt.step(*case.batch(index))
        step(theirs, index)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)
    names = {id(p): name for name, p in model.named_parameters()}
    own = dict(plain.named_parameters())
    back = kind([{"params": [own[names[id(p)]] for p in group["params"]]} for group in opt.param_groups], lr=0.5)
    back.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step(*case.batch(3))
    step(back, 3)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)
