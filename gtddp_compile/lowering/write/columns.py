"""Instructions of the forms with several columns a sample (docs/theory.md#columns), where they differ from rank one."""

from __future__ import annotations

import math
from functools import cache

import torch
from sympy import HadamardProduct, Inverse, MatrixExpr

from gtddp_compile.algebra import collapsed as a
from gtddp_compile.algebra.collapsed import CollapsedForm
from gtddp_compile.errors import CompileError
from gtddp_compile.graph import ControlGraph, Player
from gtddp_compile.graph.ops import Method
from gtddp_compile.lowering.builder import Builder
from gtddp_compile.lowering.instructions import SAMPLES, Apply, Function, Var, item, total
from gtddp_compile.lowering.write.calls import bundle, layer
from gtddp_compile.methods.terminal import MonteCarlo
from gtddp_compile.options import Options


def terminal_columns(b: Builder, end: int) -> None:
    """The value function at the end: ``V_x = A``, ``P_T`` a multiple of the identity over all columns."""
    form, coupling = b.plan.form.name, b.plan.coupling
    group = coupling if isinstance(coupling, int) else None
    rank = Var("rank")
    any_output = b.g(next(value.name for value in b.graph.values if value.dies == end and not value.fixed), end)
    b.emit(
        "loss", end, "rank", "=", Apply("-", (item(Apply(".shape", (Var(any_output),)), 0), 1)), note="columns a sample"
    )
    for name, width in (("rows", rank), ("rows_all", Apply("+", (1, rank)))):
        size = Apply("*", (group, width)) if group else None
        b.emit("loss", end, name, "rows_of", Apply("*", (SAMPLES, width)), size,
               note="columns of every group of samples")  # fmt: skip
    b.emit("loss", end, "tau", "group_scale", Var("rows"), Apply("*", (SAMPLES, rank)), note="B / b")
    repeated = Apply(".repeat_interleave()", (Var("ones"), rank))
    b.emit("loss", end, f"alpha_{end}", "=", Apply("*", (repeated, 0)), note="V_x = A + G alpha")
    b.emit("loss", end, (), "m.keep", end, alpha=Var(f"alpha_{end}"), start=Var("start"),
           samples=SAMPLES)  # fmt: skip
    if form in a.COUPLED:
        b.emit("loss", end, f"y_{end}", "=", Var(f"alpha_{end}"), note="y_T = P_T^-1 alpha_T")
        b.emit("loss", end, f"lambda_{end}", "blocks_diagonal",
               Apply("/", (repeated, Var("start"))), Var("rows"), note="Lambda_T = P_T^-1")  # fmt: skip
        return
    b.emit("loss", end, f"own_{end}", "samples_identity", Var("start"), Var("ones"), Var("rank"), note="P_T")
    if form != "block":
        root = Apply("**", (Var("start"), 0.5))
        b.emit("loss", end, f"root_{end}", "samples_identity", root, Var("ones"), rank, note="P_T = root root^T")


@cache
def environment() -> dict[MatrixExpr, str]:
    """Variables of what the derived formulas mention beside the names of rank one; ``{t}`` stands for the stage."""
    pulled = a.GRADIENTS.T * Inverse(a.CURVATURE)
    return {
        a.TARGET_NEXT: "y_{after}",
        a.TARGET: "y_{t}",
        pulled * a.BASE: "cross_{t}",
        a.GROUP_SCALE * pulled * a.BASE: "cross_{t}",
        pulled * a.DECAY: "fall_{t}",
    }


def sample_matrices() -> dict[MatrixExpr, str]:
    """Matrices held as one block a sample."""
    return {a.OWN_NEXT: "own_{after}"}


def split(b: Builder, t: int) -> None:
    """``Γ`` and the cross terms, from the Gram matrix over all columns."""
    b.emit("backward", t, (f"gamma_{t}", f"cross_{t}"), "split_columns", Var(f"columns_{t}"), Var("rank"), Var("start"),
           Var("tau"), note="Gamma; tau Psi M^-1 gamma^T alpha_T")  # fmt: skip


def shrink(b: Builder, t: int, grams: list[str]) -> None:
    """``P`` of a sample where ``Q_uu = M``: the radicand's eigenvalues at least 0 and counted (docs/theory.md#columns).

    ``grams``: variables of ``Γ_ii`` of the stage's blocks.
    """
    b.emit("backward", t, f"gamma_{t}", "=", total([Var(gram) for gram in grams]), note="Gamma_ii")
    equation = b.plan.form.backward["R"]
    b.emit("backward", t, (f"root_{t}", f"own_{t}", f"clipped_{t}"), "shrink_samples", Var(f"root_{t + 1}"),
           Var(f"gamma_{t}"), radicand_sign(equation.expression), note=f"R ({equation.source})")  # fmt: skip
    b.emit("backward", t, (), "m.keep", t, radicands=Var(f"clipped_{t}"))


def radicand_sign(expression: MatrixExpr) -> int:
    """1 or -1 if the derived block is ``root (I ∓ rootᵀ Γ_ii root) rootᵀ`` with ``P' = root rootᵀ``."""
    own = a.OWN_NEXT * HadamardProduct(a.GRAM, a.SAMPLES) * a.OWN_NEXT
    for sign in (1, -1):
        if (expression - a.OWN_NEXT + sign * own).doit() == 0 * a.OWN:
            return sign
    raise CompileError(f"no instruction computes the derived block {expression}", "Use backend='dense'")


def sample_gram(b: Builder, t: int, player: Player, metric: str, given: Var | None = None) -> str:
    """``Γ_ii`` of one player over all its uses."""
    use, result = b.layer(player).single, f"gamma_{t}_{b.identity(player)}"
    if use is not None and not b.plan.turned:
        b.emit("backward", t, result, "sample_grams", Function(b.kernel(use, "per_sample")), given or layer(b, use),
               Var(metric))  # fmt: skip
        return result
    found = []
    for use in b.uses(player.name):
        name, psi = f"gamma_{b.name(use.key)}_rows", item(Var(b.g_output(use.op)), slice(1, None))
        b.emit("backward", t, name, "factor_rows", Function(b.kernel(use, "per_sample")), bundle(b, use, g=psi),
               note="Psi")  # fmt: skip
        found.append((use.names, Var(name)))
    total = f"gamma_{b.identity(player)}_total"
    b.emit("backward", t, total, "gather", player.parameters, *found, note="every use")
    b.emit("backward", t, result, "joint_sample_grams", Var(total), Var(metric), Var("rank"))
    return result


def describe_terminal(graph: ControlGraph, form: CollapsedForm, options: Options) -> str:
    """The terminal Hessian, how many columns a sample has, and the size of the matrices the program factors."""
    if not form.factored:
        return f"terminal {options.terminal_kind}: 1 column a sample" if form.name != "base" else "no value Hessian"
    count: int | None = None
    if isinstance(options.terminal, MonteCarlo):
        count = options.terminal.rank
    else:
        shapes = [graph.op(value.name).shape for value in graph.values if value.dies == len(graph.stages)]
        known = [shape[1:] for shape in shapes if shape is not None]
        count = sum(math.prod(shape) for shape in known) if len(known) == len(shapes) else None
    columns = "r" if count is None else str(count)
    samples = {"full": "B", "block": "B"}.get(str(options.coupling), str(options.coupling))
    shape = f"{columns} x {columns} a sample" if form.name in ("substituted", "printed") else f"{samples}*{columns}"
    return f"terminal {options.terminal}: {columns} columns a sample, matrices of size {shape}"


def vectorises(graph: ControlGraph, stage: int) -> bool:
    """Whether the stage is made of torch's own operations, whose reverse passes ``vmap`` all supports.

    Code of the user's own (a registered operation, a function or module that is kept whole) may not; it is pulled back
    one column at a time.
    """
    return all(_is_torchs_own(graph.op(name).target) for name in graph.stages[stage].ops)


def _is_torchs_own(target: object) -> bool:
    if isinstance(target, Method | torch.nn.Module):
        return isinstance(target, Method) or type(target).__module__.startswith("torch.nn.")
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(target).partition(".")[0] in {"aten", "prims"}
    home = str(getattr(target, "__module__", None) or type(target).__module__)
    return home.partition(".")[0] in {"torch", "operator", "_operator", "math", "builtins", "gtddp_compile"}
