"""K-FAC and EK-FAC: Proposition 4 against the published algorithms, the generated program against the dense one."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import EKFAC, KFAC, CompileError, compile_optimizer
from support import networks
from support.compared import FORMS, assert_equal, parameters
from support.kronecker_reference import Reference
from support.networks import Case, make

LOSS = nn.CrossEntropyLoss()
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.3, "damping": 1e-2},
    "lazy": {"lr": 0.1, "damping": 1e-2, "refresh": 3, "stat_decay": 0.5},
    "seldom": {"lr": 0.1, "damping": 1e-2, "refresh": 1, "stat_every": 2, "stat_decay": 0.5},
    "momentum": {"lr": 0.1, "damping": 0.1, "refresh": 1, "momentum": 0.9, "weight_decay": 0.05},
}


def conv_mixed(seed: int = 0) -> Case:
    """Strides, dilation, groups, a layer without bias, a projection, a norm."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(net.stem(x))
        y = torch.tanh(net.norm(net.grouped(x)))
        return net.head((net.down(y) + net.short(x)).flatten(1))

    model = make(
        forward,
        seed,
        stem=lambda: nn.Conv2d(1, 4, 3, padding=1, stride=(1, 2)),
        grouped=lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        norm=lambda: nn.GroupNorm(2, 4),
        down=lambda: nn.Conv2d(4, 3, (3, 1), stride=2, padding=(1, 0), bias=False),
        short=lambda: nn.Conv2d(4, 3, 1, stride=2),
        head=(6, 3),
    )
    return Case(model, (1, 4, 4), {})


def embedded(seed: int = 0) -> Case:
    """Tokens: an embedding, layers applied at every position, a layer norm."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        tokens = net.table((x.abs() * 3).long().clamp_max(5)) + 0.1 * x.unsqueeze(-1).expand(-1, -1, 4)
        return net.head((tokens + net.mix(torch.tanh(net.norm(tokens)))).mean(1))

    model = make(forward, seed, table=lambda: nn.Embedding(6, 4), norm=lambda: nn.LayerNorm(4), mix=(4, 4), head=(4, 3))
    return Case(model, (5,), {})


CASES = {
    "mlp": networks.mlp,
    "residual": networks.residual,
    "projection": networks.projection,
    "attention": networks.attention,
    "conv": conv_mixed,
    "conv_residual": lambda: networks.conv_residual(training=False),
    "embedded": embedded,
}


# --- Proposition 4 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("network", CASES)
def test_proposition_4(network: str, kind: str, setting: str) -> None:
    """With feedback off it is the published method, to 1e-8, over several steps."""
    case = CASES[network]()
    ours, theirs = copy.deepcopy(case.model), copy.deepcopy(case.model)
    options = SETTINGS[setting]
    opt = compile_optimizer(ours, case.batch(0, 12)[0], loss=LOSS, curvature=kind, feedback=False, **options)
    reference = Reference(theirs, kind, **options)
    for step in range(5):
        reference.step(*case.batch(step, 12))
        opt.step(*case.batch(step, 12))
    assert (parameters(theirs) - parameters(case.model)).abs().max() > 1e-3
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=0, atol=1e-8)


@pytest.mark.parametrize("options", [{"pi": False}, {"small": 0}, {"damping": 0.5, "small": 3}])
def test_proposition_4_without_pi_and_with_diagonal_layers(options: dict[str, Any]) -> None:
    case = embedded()
    ours, theirs = copy.deepcopy(case.model), copy.deepcopy(case.model)
    options = {"lr": 0.1, "damping": 1e-2} | options
    opt = compile_optimizer(ours, case.batch(0, 12)[0], loss=LOSS, curvature="kfac", feedback=False, **options)
    reference = Reference(theirs, "kfac", **options)
    for step in range(4):
        reference.step(*case.batch(step, 12))
        opt.step(*case.batch(step, 12))
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=0, atol=1e-8)


# --- fast equals dense ------------------------------------------------------------------------------------------------

CURVATURES: dict[str, dict[str, Any]] = {
    "kfac": {"curvature": "kfac", "lr": 0.2, "damping": 1e-2, "refresh": 2, "momentum": 0.5, "weight_decay": 0.05},
    "ekfac": {"curvature": "ekfac", "lr": 0.2, "damping": 1e-2, "refresh": 1},
}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "substituted"])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("network", CASES)
def test_fast_equals_dense(network: str, curvature: str, form: str) -> None:
    assert_equal(CASES[network](), cooperative=False, steps=3, **CURVATURES[curvature], **FORMS[form])


@pytest.mark.parametrize("form", ["full", "groups", "block"])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("schedule", ["asap", "alap", "sequential"])
def test_fast_equals_dense_under_every_schedule(schedule: str, curvature: str, form: str) -> None:
    options = {"schedule": schedule, "steps": 3, "size": 9}
    assert_equal(networks.projection(), **options, **CURVATURES[curvature], **FORMS[form])


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("feedback", ["open", False])
def test_fast_equals_dense_without_feedback(feedback: Any, curvature: str) -> None:
    assert_equal(networks.residual(), feedback=feedback, steps=3, **CURVATURES[curvature])


@pytest.mark.parametrize("curvature", CURVATURES)
def test_diagonal_blocks_and_batch_norm(curvature: str) -> None:
    assert_equal(embedded(), small=0, steps=3, **CURVATURES[curvature])
    assert_equal(networks.conv_residual(training=True), steps=3, **CURVATURES[curvature])


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_in_pieces_it_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches whose unfolded inputs do not fit: the chunked forms of factors, moments and Gram matrices."""
    case, found = conv_mixed(), []
    for chunk in (2**24, 64):
        monkeypatch.setattr("gtddp_compile.kernels.kronecker.CHUNK", chunk)
        model = copy.deepcopy(case.model)
        opt = compile_optimizer(model, loss=LOSS, curvature=name, lr=0.1, damping=1e-2, refresh=1)
        for step in range(2):
            opt.step(*case.batch(step))
        found.append(parameters(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)


# --- as an optimizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_state_dict_resumes_bit_for_bit(name: str) -> None:
    case = networks.projection()
    model = copy.deepcopy(case.model)
    options = {"loss": LOSS, "curvature": name, "refresh": 2, "momentum": 0.5}
    opt = compile_optimizer(model, **options)
    for step in range(3):
        opt.step(*case.batch(step))
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream)
    other = copy.deepcopy(case.model)
    resumed = compile_optimizer(other, **options)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    for step in range(3, 6):
        assert torch.equal(opt.step(*case.batch(step)), resumed.step(*case.batch(step)))
    assert torch.equal(parameters(model), parameters(other))


def test_pickle_and_lower_precision() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
        x, y = torch.randn(9, 4).to(dtype), torch.randint(3, (9,))
        opt = compile_optimizer(model, x, loss=LOSS, curvature=EKFAC(lr=0.05, damping=0.1))
        first = float(opt.step(x, y))
        twin = pickle.loads(pickle.dumps(opt))
        assert torch.equal(opt.step(x, y), twin.step(x, y))
        opt.load_state_dict(opt.state_dict())
        for _ in range(10):
            last = float(opt.step(x, y))
        assert last < first
        assert all(p.dtype == dtype for p in model.parameters())


def test_a_failed_step_changes_nothing() -> None:
    case = networks.residual()
    model = copy.deepcopy(case.model)
    opt = compile_optimizer(model, case.batch(0)[0], loss=LOSS, curvature="kfac")
    opt.step(*case.batch(0))
    before, state = parameters(model), copy.deepcopy(opt.state_dict())
    with pytest.raises(CompileError):
        opt.step(case.batch(0)[0], torch.full((7,), 9))
    assert torch.equal(before, parameters(model)) and str(state) == str(opt.state_dict())


def test_cholesky_failure_is_counted_and_survived() -> None:
    """Fewer samples than inputs and no damping: the factors are singular."""
    case = networks.residual()
    opt = compile_optimizer(copy.deepcopy(case.model), loss=LOSS, curvature="kfac", damping=0.0, refresh=1, lr=1e-6)
    assert torch.isfinite(opt.step(*case.batch(0, 2)))
    assert opt.diagnostics["solve_fallbacks"] > 0
    opt = compile_optimizer(copy.deepcopy(case.model), loss=LOSS, curvature="kfac")
    opt.step(*case.batch(0))
    assert opt.diagnostics["solve_fallbacks"] == 0


def turned(values: Tensor, vectors: Tensor) -> Tensor:
    """The eigenvectors with those of the null space turned by a random rotation, those beside it mirrored."""
    source, found = torch.Generator().manual_seed(0), vectors.clone()
    for basis, null in zip(found, values < 1e-12 * values[:, -1:], strict=True):
        count = int(null.sum())
        rotation = torch.linalg.qr(torch.randn(count, count, dtype=vectors.dtype, generator=source))[0]
        basis[:, null] = basis[:, null] @ rotation
        basis[:, ~null] *= -1
    return found


@pytest.mark.parametrize("feedback", [True, False])
def test_the_choice_of_a_basis_of_a_null_space_does_not_matter(feedback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 3, factors up to 8 wide, three steps in one eigenbasis: what another machine's eigh may return."""
    case, found, seen = networks.gated(), [], []
    true_eigh = torch.linalg.eigh

    def other_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = true_eigh(matrix)
        seen.append(turned(values, vectors))
        assert (vectors @ (values.unsqueeze(1) * vectors).mT - matrix).abs().max() < 1e-12
        return values, seen[-1]

    for eigh in (true_eigh, other_eigh):
        monkeypatch.setattr("torch.linalg.eigh", eigh)
        model = copy.deepcopy(case.model)
        opt = compile_optimizer(model, loss=LOSS, curvature=EKFAC(lr=0.1, damping=1e-2, refresh=3), feedback=feedback)
        for step in range(3):
            opt.step(*case.batch(step, 3))
        found.append(parameters(model))
    assert seen and (found[0] - parameters(case.model)).abs().max() > 1e-2
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


def test_learning_rates_by_group() -> None:
    """A player whose learning rate is 0 stays, its companion in the coalition moves."""
    case = networks.projection()
    model = copy.deepcopy(case.model)
    opt = compile_optimizer(model, case.batch(0)[0], loss=LOSS, curvature="kfac", lr=0.1)
    assert any(set(stage.players) == {"a", "short"} for stage in opt.graph.stages)
    next(group for group in opt.param_groups if group["name"] == "a")["lr"] = 0.0
    opt.step(*case.batch(0))
    before, after = dict(case.model.named_parameters()), dict(model.named_parameters())
    assert torch.equal(before["a.weight"], after["a.weight"])
    assert not torch.equal(before["short.weight"], after["short.weight"])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (KFAC, {"damping": -1.0}, "KFAC: damping is -1.0"),
        (EKFAC, {"damping": 0.0}, "EKFAC: damping is 0.0.*positive"),
        (KFAC, {"stat_decay": 1.0}, "stat_decay is 1.0"),
        (EKFAC, {"stat_every": 0}, "stat_every is 0"),
        (EKFAC, {"refresh": 0}, "refresh is 0"),
        (KFAC, {"small": -1}, "small is -1"),
        (KFAC, {"maximize": True}, "maximize"),
        (KFAC, {"lr": "x"}, "lr is x"),
    ],
)
def test_options_are_checked(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match="(?s)" + message):
        kind(**options)


def test_statistics_come_from_v_h() -> None:
    """With feedback the factors are those of ``α g_h``: they differ from the plain gradient's wherever P has shrunk;
    not in the linear rollout, whose P is not known before.
    """
    case, found = networks.mlp(), []
    for options in ({"rollout": "nonlinear"}, {"feedback": False}, {"rollout": "linear"}):
        model = copy.deepcopy(case.model)
        opt = compile_optimizer(model, loss=LOSS, curvature="kfac", lr=0.5, **options)  # type: ignore[arg-type]
        opt.step(*case.batch(0))
        found.append({name: opt.state[p]["factor_g"] for name, p in model.named_parameters() if "weight" in name})
    torch.testing.assert_close(found[0]["c.weight"], found[1]["c.weight"])  # α_T = 1/B
    assert (found[0]["a.weight"] - found[1]["a.weight"]).abs().max() > 1e-6
    torch.testing.assert_close(found[2], found[1])
