"""Several processes make the update of one process with the joined batch; what they send is what the paper says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from gtddp_compile import CompileError, Geometric, Nystrom, compile_optimizer
from gtddp_compile.methods.curvature import REGISTRY
from support.once import folder_of_all, once
from support.ranked import Case, counted, differences, late, left, of_graphs, on_ranks, refusals, whole, wrapped
from support.sharded import REFUSED_SHARDS, RESUMED, apart, between_steps, refused_shards, resumed

WEIGHT = torch.tensor([0.2, 1.0, 3.0]).double()
UNEVEN, FOUR = (6, 5), (3, 2, 2, 4)  # groups in one process are of one size but for the last; 6 / (6 / 11) is not 11


def case(network: str, curvature: str, coupling: str, shards: tuple[int, ...], **options: Any) -> tuple[str, Case]:
    said = "".join(f" {name}" for name in options)
    return f"{network} {curvature} {coupling}{said}", Case(network, {"curvature": curvature, "coupling": coupling,
                                                                     **options}, shards)  # fmt: skip


STEADY: Mapping[str, Mapping[str, Any]] = {"soap": {"eps": 1e-2}, "shampoo": {"eps": 1e-2}}
"""With little in the denominator, directions that no sample has are divided by rounding."""
PAIRS = dict(
    case("conv", name, coupling, UNEVEN, **STEADY.get(name, {})) for name in REGISTRY for coupling in ("full", "local")
)
PAIRS |= dict(
    [
        case("norms", "foof", "full", UNEVEN),
        case("norms", "kfac", "local", UNEVEN),
        case("norms", "sgd", "full", UNEVEN, feedback=False),
        case("conv", "kfac", "full", UNEVEN, feedback=False),
        case("conv", "adam", "full", UNEVEN, feedback=False, max_grad_norm=0.1),
        case("conv", "sgd", "full", UNEVEN, max_step=0.01, weight_decay=0.1),
        case("conv", "foof", "local", UNEVEN, max_step=0.01, max_grad_norm=0.01),
        case("conv", "sgd", "full", UNEVEN, loss=nn.CrossEntropyLoss(reduction="sum"), momentum=0.9),
        case(
            "conv", "sgd", "full", UNEVEN, loss=nn.MSELoss(), terminal=Geometric(reach=1.0), inertia=0.9, lookahead=0.7
        ),
        case("conv", "adam", "local", UNEVEN, loss=nn.MSELoss(), terminal=Geometric(reach=1.0), max_step=1.0),
        case("conv", "adam", "local", UNEVEN, loss=nn.CrossEntropyLoss(WEIGHT)),
        case("conv", "foof", "full", UNEVEN, loss=nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)),
        case("conv", "sgd", "local", UNEVEN, loss=nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)),
        case("conv", "rmsprop", "full", UNEVEN, loss=nn.CrossEntropyLoss(ignore_index=1), memory="recompute"),
    ]
)
TURNS = ("full", FOUR), ("local", (4, 4, 4, 2))
FOURS = dict(case("norms", name, *TURNS[n % 2], **STEADY.get(name, {})) for n, name in enumerate(REGISTRY))
FOURS |= dict([case("tokens", "ekfac", "full", FOUR), case("tokens", "foof", "local", (4, 4, 4, 2))])
COUNTED = dict([
    case("conv", "foof", "full", (4, 4)), case("conv", "soap", "full", (4, 4)), case("tokens", "kfac", "full", (4, 4)),
    case("conv", "adam", "local", (4, 4)),
])  # fmt: skip
COUNTED_FOUR = dict([case("conv", "ekfac", "full", (4,) * 4), case("conv", "sgd", "local", (4,) * 4)])
DIVIDED = dict(case("conv", name, "full", UNEVEN) for name in ("sgd", "adam", "kfac", "foof"))
DIVIDED |= dict([case("conv", "adam", "local", UNEVEN), case("conv", "foof", "local", UNEVEN)])
DIVIDED |= dict([case("tokens", "foof", "full", UNEVEN)])
DIVIDED_FOUR = dict([case("conv", "foof", "full", FOUR)])
REFUSED: Mapping[str, Mapping[str, Any]] = {
    "backend": {"backend": "dense"}, "rollout": {"rollout": "nonlinear"}, "feedback": {"feedback": "open"},
    "coupling": {"coupling": 3}, "terminal": {"terminal": "ggn"}, "compile": {"compile": True},
    "gram": {"gram": Nystrom(), "curvature": "sgd"}, "line_search": {"line_search": (0.5, 1.0)},
}  # fmt: skip
WRAPPED = Case("conv", {"curvature": "foof"}, (2, 2))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    def made(folder: Path) -> list[Any]:
        jobs = {"differences": (differences, PAIRS), "counted": (counted, COUNTED), "wrapped": (wrapped, WRAPPED),
                "refusals": (refusals, REFUSED), "graphs": (of_graphs, ((3, 5, 2), (7, 4))),
                "apart": (apart, DIVIDED), "between": (between_steps, None), "left": (left, WRAPPED),
                "resumed": (resumed, folder), "shards": (refused_shards, None)}  # fmt: skip
        return on_ranks(2, jobs, folder)

    return once(folder_of_all(tmp_path_factory, "two"), made)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_all(tmp_path_factory, "four")


@pytest.fixture(scope="module")
def four(folder: Path) -> list[Any]:
    jobs = {
        "differences": (differences, FOURS),
        "apart": (apart, DIVIDED_FOUR),
        "counted": (counted, COUNTED_FOUR),
        "late": (late, WRAPPED),
    }
    return once(folder, lambda folder: on_ranks(4, jobs, folder))  # type: ignore[no-any-return]


def of(ranks: list[Any], job: str, name: str) -> list[Any]:
    """What every rank found."""
    for found in ranks:
        assert not isinstance(found, str), found
    return [found[job][name] for found in ranks]


@pytest.mark.parametrize("name", PAIRS)
def test_two_ranks_make_one_process_s_steps(two: list[Any], name: str) -> None:
    assert max(of(two, "differences", name)) < 1e-9


@pytest.mark.parametrize("name", FOURS)
def test_four_ranks_make_one_process_s_steps(four: list[Any], name: str) -> None:
    assert max(of(four, "differences", name)) < 1e-9


def test_graphs_of_two_ranks(two: list[Any]) -> None:
    assert max(found["graphs"] for found in two) < 1e-9


@pytest.mark.parametrize("step", [0, 3], ids=["statistics are taken", "and are not"])
@pytest.mark.parametrize("name", [*COUNTED, *COUNTED_FOUR])
def test_what_is_sent_is_what_the_paper_says(two: list[Any], four: list[Any], name: str, step: int) -> None:
    ranks = two if name in COUNTED else four
    for way, paper, found in of(ranks, "counted", f"{name} {step}"):
        assert found == paper
        assert way == ("rows" if name in COUNTED else "blocks") or "local" in name


def test_a_model_in_distributed_data_parallel(two: list[Any]) -> None:
    for found in two:
        assert not isinstance(found, str) and found["wrapped"][0] == 0.0
    assert two[0]["wrapped"] == two[1]["wrapped"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_several_ranks_do_not_make_is_refused(two: list[Any], name: str) -> None:
    for said in of(two, "refusals", name):
        assert f"process_group with {name}=" in said


def test_ranks_begin_alike_or_are_refused(two: list[Any]) -> None:
    assert all("the parameters or buffers of rank 1" in said for said in of(two, "refusals", "parameters"))
    assert all("the options or states of the optimizer" in said for said in of(two, "refusals", "options"))


def test_ranks_go_on_alike_or_are_refused(two: list[Any]) -> None:
    assert all("the instructions of the program of rank 1" in said for said in of(two, "refusals", "program"))
    assert all("the shapes of a sample of rank 1" in said for said in of(two, "refusals", "shapes"))


def test_what_reads_one_process_s_program_is_refused(two: list[Any]) -> None:
    assert all("accumulate() with process_group" in said for said in of(two, "refusals", "accumulate"))
    assert all("collectives of 2 ranks" in said for said in of(two, "refusals", "export"))


def test_no_rank_stops_alone(two: list[Any]) -> None:
    assert of(two, "refusals", "one rank's loss is not finite") == ["skipped True, unchanged True"] * 2


def test_a_rank_that_does_not_come_ends_the_others(four: list[Any]) -> None:
    *others, last = (found["late"] for found in four)
    assert last == "late, unchanged True"
    assert all("did not come within the group's time-out" in said for said in others)
    assert all(said.endswith("unchanged True") for said in others)


def test_a_killed_rank_ends_the_others(four: list[Any], folder: Path) -> None:
    for rank in range(3):
        said = (folder / f"{rank}").read_text()
        assert said.startswith(f"rank {rank} of 4: ") and "another process ended" in said
        assert said.endswith("unchanged True")


def test_a_group_ends_before_its_optimizer(two: list[Any]) -> None:
    assert [found["left"] for found in two] == [True, True]


def test_without_processes() -> None:
    model, x = nn.Sequential(nn.Linear(2, 3)), torch.randn(4, 2)
    with pytest.raises(CompileError, match="a group a rank, and there is one process"):
        compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), coupling="local")
    with pytest.raises(CompileError, match=r"torch\.distributed is not initialised"):
        compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), process_group="world")


def test_a_group_of_one_is_one_process() -> None:
    x, y, models = torch.randn(6, 2), torch.tensor([0, 1, 2] * 2), []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for options in ({}, {"process_group": "world", "coupling": "local"}, {"curvature": "foof"}):
            torch.manual_seed(0)
            models.append(nn.Sequential(nn.Linear(2, 3)))
            if "curvature" in options:
                fully_shard(models[-1])
            opt = compile_optimizer(models[-1], x, loss=nn.CrossEntropyLoss(), **options)
            opt.step(x, y)
            opt.step(x, y)
        with pytest.raises(CompileError, match="in one process"):
            opt.feedback_modes("0", x, y)
        with pytest.raises(CompileError, match=r"module '0': compile=True: parameter '0\.weight' .* Leave compile or"):
            compile_optimizer(models[2], x, loss=nn.CrossEntropyLoss(), curvature="sgd", compile=True)
        wrapped = FullyShardedDataParallel(nn.Sequential(nn.Linear(2, 3)), device_id=torch.device("cpu"))
        with pytest.raises(CompileError, match="wrapped by FullyShardedDataParallel"):
            compile_optimizer(wrapped, x, loss=nn.CrossEntropyLoss())
        assert torch.equal(models[0][0].weight, whole([models[2][0].weight])[0])
    finally:
        dist.destroy_process_group()
    assert torch.equal(models[0][0].weight, models[1][0].weight)


@pytest.mark.parametrize("name", DIVIDED)
def test_two_ranks_train_a_model_in_shards(two: list[Any], name: str) -> None:
    assert max(of(two, "apart", name)) < 1e-9


@pytest.mark.parametrize("name", DIVIDED_FOUR)
def test_four_ranks_train_a_model_in_shards(four: list[Any], name: str) -> None:
    assert max(of(four, "apart", name)) < 1e-9


def test_shards_between_steps(two: list[Any]) -> None:
    for found in two:
        assert found["between"] == dict.fromkeys(found["between"], True)


@pytest.mark.parametrize("name", RESUMED)
def test_shards_resume_bit_for_bit(two: list[Any], name: str) -> None:
    assert of(two, "resumed", name) == [0.0, 0.0]


@pytest.mark.parametrize("name", REFUSED_SHARDS)
def test_shards_that_no_step_takes_are_refused_by_name(two: list[Any], name: str) -> None:
    assert all(REFUSED_SHARDS[name] in said for said in of(two, "shards", name))
