"""Memory formats, autocast and low-precision models: what is added up over samples stays float32 or better."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, CompileError, compile_optimizer
from support import networks
from support.architectures import EXAMPLES, Example
from support.compared import LOSS, flat
from support.exported import targets_for
from support.networks import make

LOW = [torch.bfloat16, torch.float16]
OPTIONS: list[dict[str, Any]] = [
    {}, {"curvature": "sgd", "momentum": 0.9, "weight_decay": 0.01, "memory": "recompute"},
    {"curvature": "rmsprop", "lr": 0.01, "eps": 1e-3}, {"curvature": "adam", "lr": 0.01, "gram": "separable"},
    {"curvature": "ekfac"}, {"terminal": "ggn", "coupling": 2},
    {"coupling": "block", "recursion": "substituted", "lr": 0.01},
    {"feedback": False, "curvature": "adamw", "lr": 0.01},
]  # fmt: skip


def compiled(model: nn.Module, **options: Any) -> CompiledOptimizer:
    return compile_optimizer(model, **{"curvature": "sgd", "loss": LOSS, "lr": 0.1, **options})


def example(name: str, dtype: torch.dtype) -> Example:
    found = EXAMPLES[name]()
    return Example(found.model.to(dtype), tuple(x.to(dtype) for x in found.inputs))


def figures(opt: CompiledOptimizer) -> list[Tensor]:
    """Tensors over samples of the last step."""
    found = []
    for stage in opt._diagnostics._stages.values():
        found += [value for value in stage.values() if isinstance(value, Tensor) and value.dim()]
        found += [block for key in ("factor",) for block in stage.get(key, ())]
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet18_like", {}), ("resnet18_like", {"curvature": "kfac"}), ("unet_like", {"curvature": "adam", "lr": 0.01})],
)
def test_channels_last_is_kept_and_changes_nothing(name: str, options: dict[str, Any]) -> None:
    plain, last = EXAMPLES[name](), EXAMPLES[name]()
    last.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs = tuple(x.to(memory_format=torch.channels_last) for x in last.inputs)
    strides = [p.stride() for p in last.model.parameters()]
    y = targets_for(3, 4)
    ours, theirs = compiled(last.model, **options), compiled(plain.model, **options)
    for _ in range(2):
        torch.testing.assert_close(ours.step(inputs, y), theirs.step(plain.inputs, y), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flat(last.model), flat(plain.model), rtol=1e-9, atol=1e-9)
    assert [p.stride() for p in last.model.parameters()] == strides


@pytest.mark.parametrize("name", ["attention_block", "resnet18_like", "densenet_like"])
def test_inputs_that_are_not_contiguous(name: str) -> None:
    found = []
    for strange in (False, True):
        one = EXAMPLES[name]()
        inputs = tuple(torch.stack([x, x], -1)[..., 1] if strange else x for x in one.inputs)
        assert strange != all(x.is_contiguous() for x in inputs)
        compiled(one.model).step(inputs, targets_for(3, 4))
        found.append(flat(one.model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["attention_block", "unet_like"])
def test_autocast(name: str, options: dict[str, Any]) -> None:
    """The loss falls as without it, and nothing over samples is bfloat16."""
    losses = []
    for enabled in (False, True):
        one = example(name, torch.float32)
        opt = compiled(one.model, **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append([float(opt.step(one.inputs, targets_for(3, 4))) for _ in range(4)])
        assert all(p.dtype == torch.float32 for p in one.model.parameters())
        assert all(value.dtype == torch.float32 for value in figures(opt))
        assert not opt.diagnostics["skipped"]
    assert losses[1][-1] == pytest.approx(losses[0][-1], abs=0.05)
    assert losses[1] != losses[0]


def test_the_mode_at_the_step_counts_not_that_at_compilation() -> None:
    """Losses of the step are those of the model as it is called there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 3))
    x, y = torch.randn(5, 3), targets_for(3, 5)
    opt = compiled(model, example_inputs=x)
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected = float(LOSS(model(x), y))
            assert float(opt.step(x, y)) == pytest.approx(expected, abs=1e-6)
        assert float(LOSS(model(x).bfloat16(), y)) != float(LOSS(model(x), y))


DEFAULT: dict[str, Any] = {"curvature": "foof", "lr": 3.0}
"""Its inertia is of states, which are float32."""


@pytest.mark.parametrize(
    ("dtype", "options"),
    [*zip(LOW * 4, OPTIONS, strict=True), (LOW[1], OPTIONS[0]), *((low, DEFAULT) for low in LOW)],
    ids=str,
)
def test_models_of_low_precision(dtype: torch.dtype, options: dict[str, Any]) -> None:
    one = example("attention_block", dtype)
    opt = compiled(one.model, **options)
    losses = [float(opt.step(one.inputs, targets_for(3, 4))) for _ in range(8)]
    assert losses[-1] < losses[0] and not opt.diagnostics["skipped"]
    assert all(p.dtype == dtype for p in one.model.parameters())
    states = [value for state in opt.state.values() for key, value in state.items() if isinstance(value, Tensor)
              and key not in ("taken", "rate")]  # fmt: skip
    assert all(value.dtype == torch.float32 for value in [*figures(opt), *states])


@pytest.mark.parametrize("curvature", ["sgd", "adam", "ekfac"])
def test_states_of_low_precision_models_survive_saving(curvature: str) -> None:
    """torch would round a second moment to half on loading, where it is often zero."""
    case = networks.mlp()
    model = copy.deepcopy(case.model).half()
    momentum = {"momentum": 0.9} if curvature == "sgd" else {}
    opt = compiled(model, curvature=curvature, lr=0.01, **momentum)
    x, y = case.batch(0)
    for _ in range(3):
        opt.step(x.half(), y)
    stream = io.BytesIO()
    torch.save(opt.state_dict(), stream)
    stream.seek(0)
    twin = copy.deepcopy(model)
    resumed = compiled(twin, curvature=curvature, lr=0.01, **momentum)
    resumed.load_state_dict(torch.load(stream))
    for _ in range(2):
        assert torch.equal(opt.step(x.half(), y), resumed.step(x.half(), y))
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("dtype", LOW)
def test_figures_are_the_same_under_autocast(dtype: torch.dtype) -> None:
    found = []
    for inside in (True, False):
        _, opt, x, y = parts()
        opt.step(x, y)
        with torch.autocast("cpu", dtype, enabled=inside):
            found.append(dict(opt.diagnostics))
    assert found[0] == found[1]


PARTS: list[dict[str, Any]] = [
    DEFAULT, {"curvature": "kfac", "feedback": False}, {"curvature": "adagrad"}, {"curvature": "muon"},
    {"curvature": "shampoo"}, {"curvature": "rmsprop", "lr": 0.01, "eps": 1e-3}, {"terminal": "ggn"},
    {"curvature": "soap", "eps": 1e-3}, {"memory": "recompute"}, {"rollout": "nonlinear"},
]  # fmt: skip


def parts(**options: Any) -> tuple[nn.Module, CompiledOptimizer, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 3))
    x, y = torch.randn(12, 8), targets_for(3, 12)
    return model, compiled(model, example_inputs=x[:6], gram="exact", **options), x, y


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(("dtype", "options"), [*zip(LOW * 5, PARTS, strict=True)], ids=str)
def test_micro_batches_under_autocast(dtype: torch.dtype, options: dict[str, Any], empty: bool) -> None:
    """Their update is that of groups in one batch, nothing of it but the network is low, and it survives saving."""
    model, opt, x, y = parts(**options)
    grouped, whole, *_ = parts(coupling=6, **options)
    before = flat(model)

    def update(one: CompiledOptimizer) -> Tensor:
        one.accumulate(x[:6], y[:6])
        if empty:
            one.accumulate(x[6:], y[6:])
            return one.step()
        return one.step(x[6:], y[6:])

    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(update(opt), whole.step(x, y))
        change = flat(grouped) - before
        assert float((flat(model) - flat(grouped)).norm()) < 1e-3 * float(change.norm())
        states = [value for state in opt.state.values() for key, value in state.items() if key not in ("taken", "rate")]
        assert all(value.dtype == torch.float32 for value in [*states, *figures(opt)] if isinstance(value, Tensor))
        twin = copy.deepcopy(model)
        resumed = compiled(twin, gram="exact", **options)
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert torch.equal(update(opt), update(resumed)) and torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("options", PARTS[:3], ids=str)
def test_a_micro_batch_keeps_the_autocast_it_came_under(options: dict[str, Any]) -> None:
    """Whatever is around the step, and where micro-batches are run again for a learning rate that was changed."""
    for first in (True, False):
        found = []
        for at_step, late in ((first, False), (not first, False), (not first, True)):
            model, opt, x, y = parts(**options)
            (given,) = {group["lr"] for group in opt.param_groups}
            for lr, half in ((given, slice(6)), (given / 2 if late else given, slice(6, 12))):
                for group in opt.param_groups:
                    group["lr"] = lr
                with torch.autocast("cpu", torch.bfloat16, enabled=first):
                    opt.accumulate(x[half], y[half])
            for group in opt.param_groups:
                group["lr"] = given
            with torch.autocast("cpu", torch.bfloat16, enabled=at_step):
                opt.step()
            found.append(flat(model))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


class Mixed(nn.Module):
    """Layers in turns of single and double precision, two of either alike, and a bias that is not of its weight's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, dtype=kind) for kind in (torch.float32, torch.float64) * 2)
        self.conv, self.norm = nn.Conv1d(1, 2, 2).double(), nn.LayerNorm(6)
        self.shift, self.last = nn.Parameter(torch.zeros(6, dtype=torch.float64)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        x = self.norm(self.conv(x.unsqueeze(1)).flatten(1).to(self.norm.weight.dtype)) + self.shift
        return self.last(x.to(self.last.weight.dtype))


@pytest.mark.parametrize("options", [
    DEFAULT, {"curvature": "foof", "lr": 3.0, "max_step": 0.1, "coupling": 3}, {"curvature": "kfac", "inertia": 0.9},
    {"curvature": "foof", "rollout": "nonlinear"}, {"curvature": "adam", "lr": 0.01},
], ids=str)  # fmt: skip
def test_parameters_of_two_precisions(options: dict[str, Any]) -> None:
    """Each is trained in its own, as in a model of double precision alone; micro-batches and figures too."""
    torch.manual_seed(0)
    model, x, y = Mixed(), torch.randn(6, 4), targets_for(3, 6)
    found = []
    for one, inputs in ((model, x), (copy.deepcopy(model).double(), x.double())):
        kinds = [p.dtype for p in one.parameters()]
        opt = compiled(one, **options)
        for _ in range(3):
            opt.step(inputs, y)
        opt.accumulate(inputs[:3], y[:3])
        opt.step(inputs[3:], y[3:])
        assert [p.dtype for p in one.parameters()] == kinds
        found.append((flat(one).double(), dict(opt.diagnostics)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-4)
    assert found[0][1]["predicted_decrease"] == pytest.approx(found[1][1]["predicted_decrease"], rel=1e-3)


def small() -> nn.Module:
    """Its first layer's gradients are below half's least number."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(net.a(x)) * 1e-4
        return net.c((nn.functional.silu(net.b(hidden)) * 1e-3).sin())

    return make(forward, a=(8, 8), b=(8, 8), c=(8, 3))


def gradients(model: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    opt = compiled(copy.deepcopy(model), example_inputs=x, momentum=0.9, **options)
    opt.step(x, targets_for(3, 6))
    return [opt.state[p]["momentum_buffer"].double() for p in opt.param_groups[0]["params"]]


@pytest.mark.parametrize("options", [{"feedback": False}, {"rollout": "nonlinear"}, {"terminal": "ggn"}], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_grad_scaler_keeps_the_gradients_of_half_models(autocast: bool, options: dict[str, Any]) -> None:
    """As torch's does; where its scale is too large, the step is made again, and the figures are its own."""
    torch.manual_seed(0)
    model, x, low = small(), torch.randn(6, 8), torch.float32 if autocast else torch.float16
    exact = gradients(model, x.double(), **options)
    model, x = model.to(low), x.to(low)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)  # type: ignore[attr-defined]
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        lost, kept = gradients(model, x, **options), gradients(model, x, grad_scaler=scaler, **options)
        assert all(float(g.norm()) < 0.5 * float(e.norm()) for g, e in zip(lost, exact, strict=True))
        for ours, wanted in zip(kept, exact, strict=True):
            assert float((ours - wanted).norm()) < 0.02 * float(wanted.norm())
        found = scaler.get_scale()
        assert 2.0**10 < found < 2.0**40
        for _ in range(2):
            gradients(model, x, grad_scaler=scaler, **options)
    assert scaler.get_scale() == 2 * found and scaler.state_dict()["_growth_tracker"] == 0


def test_a_grad_scaler_where_it_has_nothing_to_do() -> None:
    """Single precision and bfloat16 are not scaled; micro-batches are, and an update that overflows is given up."""
    torch.manual_seed(0)
    model, x, y = small().float(), torch.randn(6, 8), targets_for(3, 6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # type: ignore[attr-defined]
    plain = gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model, x, grad_scaler=scaler), strict=True))
    assert scaler.get_scale() == 2.0**40
    opt = compiled(model.half(), grad_scaler=scaler, on_nonfinite="skip")
    before = flat(model)
    with pytest.warns(UserWarning, match="not finite"):
        opt.accumulate(x[:3].half(), y[:3])
    opt.step(x[3:].half(), y[3:])
    assert opt.diagnostics["skipped_steps"] == 1 and scaler.get_scale() < 2.0**30
    assert not torch.equal(flat(model), before)


def test_refusals(tmp_path: Path) -> None:
    x, y = torch.randn(4, 2), targets_for(3, 4)
    opt = compiled(nn.Linear(2, 3), backend="dense")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CompileError, match="autocast"):
        opt.step(x, y)
    whole = compiled(nn.Linear(2, 3), example_inputs=x, compile={"backend": "eager"})
    for call in (whole.step, whole.accumulate):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(CompileError, match=r"under autocast\. Leave"):
            call(x, y)
    with pytest.raises(CompileError, match=r"module 'layers\.1'.*one precision.*Convert the model"):
        compiled(Mixed(), example_inputs=torch.randn(6, 4), backend="dense")
    low = compiled(nn.Linear(2, 3).bfloat16(), example_inputs=x.bfloat16())
    with pytest.raises(CompileError, match="bfloat16"):
        low.program.export(tmp_path / "step.py")
