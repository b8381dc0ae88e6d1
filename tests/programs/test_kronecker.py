"""K-FAC and EK-FAC: Proposition 4 against the published algorithms, the generated program against the dense one."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtddp_compile import EKFAC, FOOF, KFAC, CompileError, compile_optimizer, kernels
from support import networks
from support.cases import conv_mixed, convolutional, lines, wide
from support.compared import LOSS, assert_equal, batches, flat, optimizer, train, trained
from support.networks import Case, conv, make
from support.recorded import draw


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_in_pieces_it_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches whose unfolded inputs do not fit: the chunked forms of factors, moments and Gram matrices."""
    found = []
    for chunk in (2**24, 64):
        monkeypatch.setattr("gtddp_compile.kernels.kronecker.CHUNK", chunk)
        found.append(trained(conv_mixed(), curvature=name, lr=0.1, damping=1e-2, refresh=1))
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


def test_cholesky_failure_is_counted_and_survived() -> None:
    """Fewer samples than inputs and no damping: the factors are singular."""
    run = train(networks.residual(), 1, 2, curvature="kfac", damping=0.0, refresh=1, lr=1e-6)
    assert run.parameters.isfinite().all() and run.optimizer.diagnostics["solve_fallbacks"] > 0
    assert train(networks.residual(), curvature="kfac").optimizer.diagnostics["solve_fallbacks"] == 0


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
        found.append(trained(case, 3, 3, curvature=EKFAC(lr=0.1, damping=1e-2, refresh=3), feedback=feedback))
    assert seen and (found[0] - flat(case.model)).abs().max() > 1e-2
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


def test_learning_rates_by_group() -> None:
    """A player whose learning rate is 0 stays, its companion in the coalition moves."""
    case = networks.projection()
    model, opt = optimizer(case, curvature="kfac", lr=0.1)
    assert any(set(stage.players) == {"a", "short"} for stage in opt.graph.stages)
    next(group for group in opt.param_groups if group["name"] == "a")["lr"] = 0.0
    opt.step(*case.batch(0))
    before, after = dict(case.model.named_parameters()), dict(model.named_parameters())
    assert torch.equal(before["a.weight"], after["a.weight"])
    assert not torch.equal(before["short.weight"], after["short.weight"])


@pytest.mark.parametrize(("kind", "options", "message"), [
    (EKFAC, {"damping": 0.0}, "EKFAC: damping is 0.0.*positive"), (KFAC, {"stat_decay": 1.0}, "stat_decay is 1.0"),
    (KFAC, {"small": -1}, "small is -1"),
])  # fmt: skip
def test_options_are_checked(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match="(?s)" + message):
        kind(**options)


@pytest.mark.parametrize("curvature", ["kfac", "shampoo"])
def test_without_momentum_there_is_no_buffer(curvature: str) -> None:
    states = train(networks.mlp(), curvature=curvature).optimizer.state
    assert states and all("momentum_buffer" not in state for state in states.values())


def test_statistics_come_from_v_h() -> None:
    """With feedback the factors are those of ``α g_h``: they differ from the plain gradient's wherever P has shrunk;
    not in the linear rollout, whose P is not known before.
    """
    case, found = networks.mlp(), []
    for options in ({"rollout": "nonlinear"}, {"feedback": False}, {"rollout": "linear"}):
        model, opt = optimizer(case, curvature="kfac", lr=0.5, **options)
        opt.step(*case.batch(0))
        found.append({name: opt.state[p]["factor_g"] for name, p in model.named_parameters() if "weight" in name})
    torch.testing.assert_close(found[0]["c.weight"], found[1]["c.weight"])  # α_T = 1/B
    assert (found[0]["a.weight"] - found[1]["a.weight"]).abs().max() > 1e-6
    torch.testing.assert_close(found[2], found[1])


@pytest.mark.parametrize("form", ["rows", "samples"])
@pytest.mark.parametrize(("samples", "positions"), [(5, 1), (40, 1), (5, 3)])
@pytest.mark.parametrize("rescaled", [False, True])
def test_kernels_against_explicit_matrices(form: str, samples: int, positions: int, rescaled: bool) -> None:
    """``γ`` and ``M⁻¹`` written out, a group at a time, with rank-deficient maps."""
    x, g, weights = draw(samples, 2, positions, 6), draw(samples, 2, positions, 5), draw(samples)
    maps, rate = (draw(2, 6, 4), draw(2, 5, 3)), 0.3
    scale: Any = draw(2, 3, 4).abs() if rescaled else 1.0
    gamma = torch.einsum("bgtm,bgtn->bgmn", g, x)
    inverse = torch.stack([
        (k := torch.kron(maps[1][group], maps[0][group])) @ (k * (scale[group].flatten() if rescaled else 1.0)).T
        for group in range(2)
    ])  # fmt: skip
    flat = gamma.flatten(2)
    gram = rate * torch.einsum("bgi,gij,cgj->bc", flat, inverse, flat)
    step = torch.einsum("gij,bgj,b->gi", inverse, flat, weights).reshape(2, 5, 6)
    moment = torch.einsum("bgmn,gmp,gnq->bgpq", gamma, maps[1], maps[0]).square()

    found = kernels.kronecker_coordinates(x, g, maps, form)
    metric, rows = ((maps,), scale, None, (rate,)), [slice(0, 3), slice(3, samples)]
    for block, row in zip(kernels.coordinates_gram(found, metric, rows), rows, strict=True):
        torch.testing.assert_close(block, gram[row, row], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kernels.coordinates_step(found, weights, metric), step, rtol=1e-10, atol=1e-10)
    expected = torch.einsum("b,bgpq->gpq", weights.square() / 0.2, moment)
    torch.testing.assert_close(kernels.coordinates_moment(found, weights, 0.2), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["rows", "samples"])
def test_a_separated_scale_of_rank_one_is_exact(form: str) -> None:
    found = kernels.kronecker_coordinates(draw(5, 2, 3, 4), draw(5, 2, 3, 3), (draw(2, 4, 4), draw(2, 3, 3)), form)
    metric = (((draw(2, 4, 4), draw(2, 3, 3)),), draw(2, 3, 1).abs() * draw(2, 1, 4).abs(), None, (0.1,))
    exact, separated = (kernels.coordinates_gram(found, metric, [slice(0, 5)], separable=s)[0] for s in (False, True))
    torch.testing.assert_close(separated, exact, rtol=1e-10, atol=1e-12)


MOMENTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plane": ((3, 4, 5), (2, 3), {"stride": (1, 2), "padding": (1, 0), "dilation": (1, 1)}),
    "same": ((2, 5, 4), (4, 2), {"stride": (1, 1), "padding": "same", "dilation": (1, 1)}),
    "dilated": ((1, 5, 6), (3, 2), {"stride": (1, 1), "padding": "valid", "dilation": (1, 3)}),
    "line": ((3, 6), (3,), {"stride": (1,), "padding": (2,), "dilation": (1,)}),
    "space": ((2, 4, 3, 3), (3, 2, 1), {"stride": (1, 1, 2), "padding": (1, 1, 0), "dilation": (1, 1, 1)}),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", MOMENTS)
def test_moments_of_patches_from_lines_that_they_share(name: str, bias: bool) -> None:
    shape, kernel, options = MOMENTS[name]
    x, weight = draw(3, *shape), draw(2, shape[0], *kernel)
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(kernel) - 1]
    basis = torch.eye(weight[0].numel(), dtype=x.dtype).reshape(-1, *weight.shape[1:])
    patches = convolve(x, basis, **options).flatten(2).transpose(0, 1).flatten(1)  # every weight's input
    patches = torch.cat([patches, torch.ones_like(patches[:1])]) if bias else patches
    params = (weight, draw(2)) if bias else (weight,)
    layer = kernels.Layer((x,), x.new_empty(0), params, (True, bias), kernels.Geometry(**options))
    found = kernels.conv_moment(layer)
    torch.testing.assert_close(found, (patches @ patches.T)[None], rtol=1e-12, atol=1e-12)


def test_a_bias_that_is_not_trained() -> None:
    """Rows have no ones, and coordinates no place for them."""
    for case in (wide(), lines()):
        case.model.a.bias.requires_grad_(False)
        assert_equal(case, steps=3, size=5, curvature="kfac", lr=0.2, damping=1e-2)


def test_coordinates_that_would_be_too_large_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    case = convolutional()
    monkeypatch.setattr("gtddp_compile.lowering.costs.LARGEST", 5 * 36)  # the head's rows fit, the convolutions' do not
    opt = compile_optimizer(copy.deepcopy(case.model), case.batch(0, 5)[0], loss=LOSS, curvature="kfac")
    assert opt.program.code.count("dual_coordinates(") == 1 and "kronecker_coordinates" not in opt.program.code
    assert_equal(case, steps=2, size=5, curvature="kfac", lr=0.2, damping=1e-2)


# --- FOOF ---


PAPER = {"coupling": "block", "recursion": "substituted"}


def normed() -> Case:
    """A convolution, a normalisation and a linear layer."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.fc(torch.tanh(net.norm(net.conv(x))).flatten(1))

    return Case(make(forward, conv=conv(2, 3), norm=lambda: nn.GroupNorm(1, 3), fc=(48, 4)), (2, 4, 4))


def published(case: Case, steps: int, lr: float, damping: float, decay: float) -> Tensor:
    """``δW = -lr G (A + λ ā I)⁻¹`` by hand: homogeneous inputs of the linear layer, channels of the convolution."""
    running: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    model = case.model
    for name in ("conv", "fc"):
        getattr(model, name).register_forward_hook(lambda _, x, __, name=name: seen.__setitem__(name, x[0].detach()))
    for step, (x, y) in enumerate(batches(case, steps, 6), start=1):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pixels = seen["conv"].movedim(1, -1).reshape(-1, 2)
        rows = F.pad(seen["fc"], (0, 1), value=1.0)
        keep = min(1 - 1 / step, decay)
        for name, factor in (("conv", pixels.T @ pixels / len(x)), ("fc", rows.T @ rows / len(x))):
            running[name] = keep * running[name] + (1 - keep) * factor if name in running else factor
        inverse = {name: torch.linalg.inv(a + damping * a.trace() / len(a) * torch.eye(len(a)).double())
                   for name, a in running.items()}  # fmt: skip
        with torch.no_grad():
            both = torch.cat([model.fc.weight.grad, model.fc.bias.grad[:, None]], 1) @ inverse["fc"]
            model.fc.weight -= lr * both[:, :-1]
            model.fc.bias -= lr * both[:, -1]
            model.conv.weight -= lr * torch.einsum("mckl,cd->mdkl", model.conv.weight.grad, inverse["conv"])
            for plain in (model.conv.bias, model.norm.weight, model.norm.bias):  # 16 positions, input 1
                plain -= lr * plain.grad / (16 * (1 + damping))
    return flat(model)


@pytest.mark.parametrize("steps", [1, 4])
def test_without_feedback_it_is_the_published_method(steps: int) -> None:
    curvature = FOOF(lr=0.05, damping=0.1, shrinkage=0.0, stat_decay=0.5, refresh=1, stat_every=1)
    found = trained(normed(), steps, 6, curvature=curvature, feedback=False)
    torch.testing.assert_close(found, published(normed(), steps, 0.05, 0.1, 0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"coupling": 4}, {"rollout": "nonlinear"}, {"feedback": False}, PAPER])
def test_a_wide_layer_has_a_factor_of_every_block_of_its_inputs(options: dict[str, Any]) -> None:
    """49 homogeneous inputs: three blocks of 17, two zeros behind the last."""
    run = assert_equal(normed(), size=6, curvature=FOOF(widest=20, lr=0.1), **options)
    assert run.optimizer.state[run.model.fc.weight]["factor_x"].shape == (3, 17, 17)


def test_a_factor_is_drawn_to_the_identity_while_few_rows_have_gone_into_it() -> None:
    """Words that never meet have the greatest effective rank, inputs that are one number the least."""
    found = {}
    for name, row in (("apart", torch.eye(48)[:40]), ("alike", torch.rand(40, 1) * torch.rand(1, 48))):
        model = nn.Linear(48, 3).double()
        opt = compile_optimizer(model, row.double()[:8], loss=nn.CrossEntropyLoss(), stat_every=1, refresh=1)
        doubts = []
        for k in range(4):
            opt.step(row.double()[8 * k : 8 * k + 8], torch.arange(8) % 3)
            doubts.append(float(opt.state[model.weight]["doubt"]))
        found[name] = doubts
    torch.testing.assert_close(found["alike"], [1 / 8, 1 / 16, 1 / 24, 1 / 32], rtol=1e-9, atol=0)
    torch.testing.assert_close(found["apart"], [1.0] * 4, rtol=1e-9, atol=0)  # as many directions as rows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_the_rank_is_of_all_inputs_and_of_any_size(bias: bool, size: float) -> None:
    """One block, three blocks (the bias's 1 in the last of them), and channels: squares of A leave float32's range."""
    x = torch.randn(40, 3, 7) * size
    for layer, taken, widest in (
        (nn.Linear(7, 3, bias=bias), x[:, 0], 64), (nn.Linear(7, 3, bias=bias), x[:, 0], 3),
        (nn.Linear(7, 3, bias=bias), x, 64),
    ):  # fmt: skip
        layer.weight.data.div_(size)
        model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))
        model(taken)
        opt = compile_optimizer(model, taken, loss=nn.CrossEntropyLoss(), curvature=FOOF(widest=widest))
        opt.step(taken, torch.arange(40) % 3)
        state, wide = opt.state[layer.weight], taken.reshape(-1, 7).double()
        own = wide.T @ wide
        if widest == 3:
            own = (
                own * torch.block_diag(*(torch.ones(n, n) for n in ((3, 3, 2) if bias else (3, 3, 1)))).double()[:7, :7]
            )
        rank = own.trace() ** 2 / own.square().sum()
        torch.testing.assert_close(state["doubt"] / state["spread"], rank.float().expand(len(state["doubt"])))
        assert all(p.isfinite().all() for p in model.parameters())


def dead() -> nn.Sequential:
    """A unit of the first layer is never on, so an input of every one-channel convolution's is zero."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=4, bias=False), nn.Flatten(),
                          nn.Linear(16, 3)).double()  # fmt: skip
    model[0].bias.data[1] = -1e3
    return model


@pytest.mark.parametrize("options", [{}, {"inertia": 0.0}, {"feedback": False}, {"rollout": "nonlinear"}], ids=str)
def test_inputs_that_are_zero_leave_their_weights_and_do_no_harm(options: dict[str, Any]) -> None:
    case = Case(dead(), (2, 5, 5))
    run = assert_equal(case, steps=3, curvature=FOOF(lr=0.1), **options)
    assert torch.equal(run.model[2].weight[1], case.model[2].weight[1])
    nothing = Case(nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3)).double())
    nothing.draw = lambda seed, size: (torch.zeros(size, 5).double(), torch.arange(size) % 3)
    before = [layer.weight.clone() for layer in nothing.model]
    found = train(nothing, steps=3, curvature="foof", **options).model
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(found, before, strict=True))


def test_no_block_of_a_wide_layer_is_of_padding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nineteen homogeneous inputs in blocks of at most four: five, not the six that eighteen over three are."""
    monkeypatch.setattr("gtddp_compile.lowering.cooperation.NARROW", 2)
    case = Case(nn.Sequential(nn.Linear(4, 18), nn.Tanh(), nn.Linear(18, 3)).double(), (4,))
    run = assert_equal(case, curvature=FOOF(lr=0.1))
    assert run.optimizer.state[run.model[2].weight]["factor_x"].shape == (5, 4, 4)


def test_factors_are_made_more_often_at_the_beginning() -> None:
    model, opt = optimizer(normed(), lr=1e-9)
    changed, before = [], None
    for step, (x, y) in enumerate(batches(normed(), 22, 6)):
        opt.step(x, y)
        now = opt.state[model.conv.weight]["map_x"].clone()
        if before is None or not torch.equal(now, before):
            changed.append(step)
        before = now
    assert changed == [0, 1, 2, 4, 10, 20]


def sketched(seed: int, columns: int, **options: Any) -> tuple[Tensor, Tensor]:
    """A sketch of ``Γ`` with its change, of one convolution."""
    x, weight = normed().batch(0, 6)[0], normed().model.conv.weight.detach()
    shape, generator = (2, 3, 3), torch.Generator().manual_seed(1)
    maps = torch.linalg.cholesky(torch.tensor([[[2.0, 0.5], [0.5, 1.0]]]).double())
    g = torch.randn(6, 3, 4, 4, generator=generator).double()
    filters = kernels.channel_filters(maps @ kernels.channel_signs(maps, shape, columns, seed), shape)
    direction = (torch.ones_like(weight), torch.arange(3).double())
    geometry = kernels.Geometry((1, 1), (1, 1), (1, 1))
    layer = kernels.Layer((x,), g, (weight, torch.zeros(3).double()), (True, True), geometry)
    rows, change = kernels.conv_sketched(layer, filters, (0.7, 0.3), direction)
    gram = rows @ rows.mT
    if not options.get("exact"):
        assert change is not None
        torch.testing.assert_close(change, kernels.conv_directional(layer, direction))
        return gram, change
    return kernels.conv_gram(kernels.conv_whitened(layer, maps), (0.7, 0.3)), gram


def test_the_sketch_is_unbiased_and_its_change_exact() -> None:
    exact, _ = sketched(0, 4, exact=True)
    grams = torch.stack([sketched(seed, 4)[0] for seed in range(400)])
    error = (grams.mean(0) - exact).norm() / exact.norm()
    one = (grams[0] - exact).norm() / exact.norm()
    assert error < one / 8  # falls as the square root of the number of sketches, 20


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_last_step_is_added_by_the_product_that_makes_the_step(blocks: int, bias: bool) -> None:
    x, g, weights, last = draw(5, 7), draw(5, 4), draw(5), (draw(4, 7), draw(4))[: 1 + bias]
    rows = kernels.in_blocks(kernels.linear_rows(kernels.Layer((x,), g, (), (True, bias))), blocks)
    width = rows[0].shape[3]
    inverses = draw(blocks, width, width), draw(1, 4, 4)
    found = kernels.dual_carried(kernels.dual_coordinates(*rows, inverses), weights, last, 0.9, 0.3)
    whole = torch.block_diag(*inverses[0])[: 7 + bias, : 7 + bias]
    ones = torch.cat([x, torch.ones(5, 1, dtype=x.dtype)], 1) if bias else x
    step = 0.3 * (weights[:, None] * g @ inverses[1][0]).T @ ones @ whole
    expected = [0.9 * last[0] - step[:, :7], *(0.9 * own - step[:, 7] for own in last[1:])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_kept_gradients_in_whitened_channels(groups: int) -> None:
    """``Γ`` of them is that of a convolution of whitened inputs."""
    width = 4 // groups
    x, g, params, maps = draw(3, 4, 5, 5), draw(3, 6, 5, 5), (draw(6, width, 3, 3), draw(6)), draw(groups, width, width)
    layer = kernels.Layer((x,), g, params, (True, True), kernels.Geometry((1, 1), (1, 1), (1, 1), groups))
    gamma, gram = kernels.conv_per_sample(layer), kernels.conv_gram(kernels.conv_whitened(layer, maps), (0.3, 0.2))
    (found,) = kernels.joint_gram(kernels.channel_rows(gamma, maps), (0.3, 0.2), [slice(0, 3)])
    torch.testing.assert_close(found, gram, rtol=1e-12, atol=1e-12)
