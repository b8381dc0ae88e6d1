"""Lower: write the plan down as instructions, stage by stage, in the order they run.

Takes a :class:`Plan`; guarantees the calls of every sweep in single assignment, and the dynamics of every stage as a
function; what is kept between the sweeps is for the passes after it to decide. Four phases: the trajectory (sweep 1,
cut at every stage; in the joint step at those that torch does not differentiate), the loss, the backward sweep
(gradients, statistics, Gram matrices, gains), the forward sweep (weights, updates, the layer again). B-vector and B×B
formulas are printed from the derived expressions; the parameter update is recognised as ``δu = -M⁻¹ (C w + ℓ)`` and
becomes one weighted gradient and one call of the base method.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from gtddp_compile.algebra import collapsed as a
from gtddp_compile.lowering.builder import Builder
from gtddp_compile.lowering.formulas import check_update, formula
from gtddp_compile.lowering.instructions import (
    SAMPLES,
    Apply,
    StageFunction,
    Var,
    total,
)
from gtddp_compile.lowering.lowered import Sweeps, Written
from gtddp_compile.lowering.plan import Plan, StagePlan
from gtddp_compile.lowering.write import alike, grams, updates
from gtddp_compile.lowering.write.adjoints import as_read, entries, pull, pull_run, recorded_runs, written_out
from gtddp_compile.lowering.write.calls import (
    contract,
    directional,
    drawn,
    player_function,
    prepare,
    product_of,
    weighted,
)
from gtddp_compile.lowering.write.columns import (
    shrink,
    split,
    terminal_columns,
)
from gtddp_compile.lowering.write.dynamics import stage_functions
from gtddp_compile.lowering.write.recursion import recursion_formula, stage_recursion
from gtddp_compile.lowering.write.statistics import Observed, observe


def lower(plan: Plan) -> Written:
    """Write the plan down."""
    check_update(plan.form, linear=plan.linear)
    b = Builder(plan)
    for op in plan.graph.ops.ops:
        b.name(op.name)
    functions = stage_functions(b)
    sweeps = _sweeps(b, functions)
    players = (player_function(b, use) for layer in plan.layers.values() for use in layer.uses if use.function)
    return Written(plan, sweeps.with_layers(), (*functions, *players), b.names)


def _sweeps(b: Builder, functions: tuple[StageFunction, ...]) -> Sweeps:
    """Every sweep, stage by stage."""
    trajectory, pulled, gains, recursion, forward = {}, {}, {}, {}, {}
    runs = recorded_runs(b)
    trajectory[-1] = b.written(lambda: _inputs(b))
    for function in functions:
        trajectory[function.stage] = trajectory.get(function.stage, ()) + b.written(
            partial(_trajectory, b, function, runs)
        )
    loss = b.written(lambda: _loss(b))
    for stage in reversed(b.plan.stages):
        pulled[stage.index] = b.written(partial(_pull_back, b, stage, runs[stage.index]))
        gains[stage.index] = b.written(partial(_gains, b, stage))
        recursion[stage.index] = b.written(partial(stage_recursion, b, stage.index))
    if b.plan.form.name == "joint" or b.plan.max_grad_norm is not None:
        decision = b.written(partial(_decide_together, b))
        together = {stage.index: b.written(partial(_update, b, stage)) for stage in reversed(b.plan.stages)}
        return Sweeps(trajectory, loss, pulled, gains, recursion, together, decision=decision)
    by_stage = {function.stage: function for function in functions}
    again = [by_stage[stage.index] for stage in b.plan.stages if stage.rerun]
    last_read = {name: function.stage for function in again for name in function.inputs}
    for stage in b.plan.stages if b.plan.form.name != "base" else ():
        decided = b.written(partial(_decide, b, stage))
        forward[stage.index] = decided + b.written(partial(_run_again, b, stage, by_stage[stage.index], last_read))
    return Sweeps(trajectory, loss, pulled, gains, recursion, forward, not any(s.statistics for s in b.plan.stages))


# --- sweep 1 ----------------------------------------------------------------------------------------------------------


def _inputs(b: Builder) -> None:
    if b.plan.inertia:
        b.emit("trajectory", -1, "p", "m.look_ahead", Var("p"), Var("targets"), note="u + mu v, or u")
    b.emit("trajectory", -1, tuple(b.name(name) for name in b.graph.ops.inputs), "=", Var("inputs"), note="x_0")


def _trajectory(b: Builder, function: StageFunction, runs: Mapping[int, range]) -> None:
    t = function.stage
    pulled = () if t < 0 or written_out(b, t) else b.plan.stages[t].pulled
    entered = entries(b, runs[t]) if pulled else {}
    for value in pulled:
        if entered.get(value) == t:
            b.emit("trajectory", t, f"{b.leaf(value, t)}", "leaf", Var(b.name(value)))
    read = partial(as_read, b) if written_out(b, t) else lambda value: Var(b.name(value))
    arguments = [
        Var(b.leaf(value, entered[value])) if value in pulled and value in entered else read(value)
        for value in function.inputs
    ]
    writes = tuple(b.name(name) for name in function.returns)
    note = f"f_{function.stage}" if function.stage >= 0 else "constant through the step"
    b.emit("trajectory", function.stage, writes, function.name, Var("p"), Var("b"), *arguments, note=note)
    for guard in (op for op in b.graph.guards if b.graph.stage_of[op.name] == function.stage):
        condition, *where = guard.args
        b.emit("trajectory", function.stage, (), "guard", Var(b.name(condition.name)), *where, note="the same path")


def _moved_outputs(b: Builder) -> tuple[str, ...]:
    return tuple(name for name in b.graph.ops.output_names if name in b.graph.value and not b.graph.value[name].fixed)


def _loss(b: Builder) -> None:
    graph, end = b.graph, len(b.graph.stages)
    moved = _moved_outputs(b)
    for name in moved:
        b.emit("loss", end, f"{b.leaf(name, end)}", "leaf", Var(b.name(name)))
    structure = b.tree(graph.ops.output, {name: b.leaf(name, end) for name in moved})
    b.emit("loss", end, "phi", "m.losses", structure, Var("targets"), note="phi_i")
    leaves = [Var(b.leaf(name, end)) for name in moved]
    gradients = tuple(b.g(name, end) for name in moved)
    if b.factored:
        b.emit("loss", end, gradients, "m.factors", Var("phi"), structure, Var("targets"), leaves,
               note="g_T, then the columns of S: H = S S^T")  # fmt: skip
    else:
        b.emit("loss", end, gradients, "loss_gradient", Var("phi"), leaves, note="g_T")
    kind, *weight = b.plan.terminal
    group = b.plan.coupling if isinstance(b.plan.coupling, int) else None
    more = () if weight == [1.0, 0.0, 0.0] else (*weight, group)
    paced, falls = kind == "geometric" and b.plan.form.name != "base", "phi"
    if paced:
        falls = "excess"
        b.emit("loss", end, falls, "m.above", Var("phi"), structure, Var("targets"), note="what phi_i can fall by")
    b.emit("loss", end, ("ones", "full_aim" if paced else "aim", "start"), "m.terminal", Var(falls), kind, *more,
           note="V_x = start g; start = 1/B or 1; where a sample's loss is to fall: by the aim")  # fmt: skip
    if paced:
        b.emit("loss", end, "pace", "m.pace", note="what a schedule has left of the step")
        aim = Apply("*", (Var("pace"), Var("full_aim")))
        if b.plan.early:
            b.emit("loss", end, "early", "m.early", b.plan.early, note="in the k-th step 1/k of it")
            aim = Apply("*", (Apply("+", (1.0, Var("early"))), aim))
        b.emit("loss", end, "aim", "=", aim)
    (terminal_columns if b.factored else _terminal)(b, end)


def _terminal(b: Builder, end: int) -> None:
    form, coupling = b.plan.form.name, b.plan.coupling
    papers = form not in a.LEVENBERG and b.plan.terminal[0] == "gradient"
    start = a.terminal(papers_scale=papers)
    values = {name: formula(value, {a.START: Var("start"), a.AIM: Var("aim")}) for name, value in start.items()}
    b.emit("loss", end, f"alpha_{end}", "=", Apply("*", (values["alpha"], Var("ones"))), note="alpha_T")
    if form in a.LEVENBERG:
        b.emit("loss", end, (), "m.keep", end, alpha=Var(f"alpha_{end}"))
    if form != "base":
        group = coupling if isinstance(coupling, int) else None
        b.emit("loss", end, "rows", "rows_of", SAMPLES, group, note="groups of samples")
    if form in a.COUPLED:
        if isinstance(coupling, int) or coupling == "local" or b.plan.max_step is not None:
            b.emit("loss", end, "tau", "group_scale", Var("rows"), SAMPLES, note="B / b")
        b.emit("loss", end, f"y_{end}", "=", values["y"], note="y_T = P_T^-1 alpha_T")
        if b.plan.alike:  # from which diagnostics goes from stage to stage
            b.emit("loss", end, (), "m.keep", end, target=Var(f"y_{end}"))
        if form == "joint":
            b.emit("loss", end, "information", "=", values["Lambda"], note="the diagonal of P_T^-1")
            if not b.plan.reach:
                b.emit("loss", end, (), "m.keep", end, information=Var("information"))
        diagonal = Var("information") if form == "joint" else values["Lambda"]
        note = "Lambda_T = P_T^-1"
        if b.plan.reach:
            diagonal, note = Apply("*", (0.0, diagonal)), "Gamma alone: Lambda_T joins it when its scale is known"
        if b.plan.gram != "nystrom":
            b.emit("loss", end, f"lambda_{end}", "blocks_diagonal", diagonal, Var("rows"), note=note)
    elif form != "base":
        b.emit("loss", end, f"rho_{end}", "=", values["rho"],
               note="rho_T: V_xx = V_x V_x^T (Prop. 5)" if papers else "rho_T: P_T = diag(rho_T)")  # fmt: skip


# --- backward sweep ---------------------------------------------------------------------------------------------------


def _pull_back(b: Builder, stage: StagePlan, run: range) -> None:
    """Gradients at the cut before the run of stages that ends here, and of its players' outputs."""
    graph, t = b.graph, stage.index
    if t == run[-1]:
        entered = entries(b, run)
        if chain := written_out(b, t):
            pull(b, stage, chain, b.g(stage.opened[0], graph.segments(stage.opened[0])[0]))
        else:
            pull_run(b, run, entered)
        for name, first in entered.items():
            later = [reader for reader in graph.segments(name) if reader > t]
            if later:
                both = total([Var(b.g(name, first)), Var(b.g(name, later[0]))])
                b.emit("backward", t, b.g(name, first), "=", both, note=f"identity block: {name} waits on")
    for tap in graph.uses_in(graph.stages[t].ops):
        prepare(b, t, tap)


def _gains(b: Builder, stage: StagePlan) -> None:
    """Statistics, Gram matrices and the collapsed recursion of one stage."""
    t, form, alpha = stage.index, b.plan.form, b.alpha(stage.index)
    blocks = b.plan.alone(stage)
    if form.name == "base":
        write = updates.base_update if b.plan.max_grad_norm is None else updates.base_gradients
        for block in blocks:
            write(b, t, block, f"alpha_{len(b.plan.stages)}")
        return
    if not blocks:  # all its layers are computed together with others
        return
    opens: dict[str, str] = {}
    paper = form.name not in a.LEVENBERG
    for player in [player for block in blocks if paper or block.kind == "parameters" for player in block.players]:
        if stage.statistics:
            opens[player.name] = weighted(b, "backward", t, player, alpha, "qu", "Q_u = f_u^T V_x")
    found = [observe(b, t, block, alpha if stage.statistics else None, opens) for block in blocks]
    if paper:
        _paper(b, stage, opens, found)
        return
    drifts: dict[str, str] = {}
    if b.plan.linear:
        drifts = {name: variable for block in found for name, variable in grams.drift(b, t, block).items()}
    pairs = {o.block.players[0].name: grams.sketched(b, t, o, drifts) for o in found}
    if b.plan.linear:
        own = [player for block in blocks for player in block.players]
        left = tuple(player for player in stage.players if player in own and not pairs.get(player.name))
        parts = [pair[1] for pair in pairs.values() if pair and pair[1] is not None]
        drift = f"fall_{t}" if b.factored else f"s_{t}"
        for player in left:
            moved = directional(b, "backward", t, player, drifts[player.name], drift)
            parts += [drawn(b, player, part) for part in moved]
        b.emit("backward", t, drift, "=", total(parts), note="gamma M^-1 l")
    gammas = {", ".join(p.name for p in o.block.players): pair[0] if pair else grams.block_gram(b, t, o)
              for o, pair in zip(found, pairs.values(), strict=True)}  # fmt: skip
    if b.plan.gram == "nystrom":
        return
    b.emit("backward", t, (), "m.keep", t, gammas={name: Var(variable) for name, variable in gammas.items()})
    gamma = f"columns_{t}" if b.factored else f"gamma_{t}"
    add = "blocks_add" if len(gammas) > 1 else "="
    b.emit("backward", t, gamma, add, *map(Var, gammas.values()), note="Gamma = sum over the stage's players")
    if b.factored:
        split(b, t)


def _paper(b: Builder, stage: StagePlan, opens: dict[str, str], found: list[Observed]) -> None:
    """The paper's block-diagonal form: one pair of scalars a sample (docs/theory.md#block)."""
    t, form = stage.index, b.plan.form
    gains = {name: variable for block in found for name, variable in grams.open_gain(b, t, block, opens).items()}
    if t == 0:
        return
    moved = [v for p in stage.players for v in directional(b, "backward", t, p, gains[p.name], f"moved_{t}")]
    b.emit("backward", t, f"moved_{t}", "=", total([Apply("wide", (part,)) for part in moved]), note="<gamma_i, k>")
    if b.factored:
        alpha = form.backward["alpha"]
        code = recursion_formula(b, t, alpha.expression)
        b.emit("backward", t, f"alpha_{t}", "=", code, note=f"alpha ({alpha.source})")
        shrink(b, t, [grams.block_sample_gram(b, t, block) for block in found])
        return
    diagonals = [grams.block_diagonal(b, t, block) for block in found]
    b.emit("backward", t, f"diagonal_{t}", "=", total([Apply("wide", (Var(d),)) for d in diagonals]), note="Gamma_ii")
    alpha, rho = form.backward["alpha"], form.backward["rho"]
    b.emit("backward", t, f"alpha_{t}", "=", recursion_formula(b, t, alpha.expression), note=f"alpha ({alpha.source})")
    code = recursion_formula(b, t, rho.expression)
    if form.name == "printed":
        b.emit("backward", t, f"rho_{t}", "=", code, note=f"rho ({rho.source})")
        return
    b.emit("backward", t, (f"rho_{t}", f"clipped_{t}"), "clip_radicand", code, note=f"rho ({rho.source})")
    b.emit("backward", t, (), "m.keep", t, radicands=Var(f"clipped_{t}"))


# --- forward sweep ----------------------------------------------------------------------------------------------------


def _decide_together(b: Builder) -> None:
    """``w`` of the joint step, every player's weighted gradient where their norm is asked for."""
    last = b.counting[-1]
    if b.plan.alike:
        alike.counted(b)
        stage_recursion(b, last)
    if b.plan.form.name == "joint":
        figures: dict[str, Any] = {"lifted": Var(f"lifted_{last}")}
        information = Var("information")
        equation = b.plan.form.forward["w"]
        if b.plan.gram == "nystrom":
            players = tuple(product_of(b, player) for player in b.graph.players)
            b.emit("joint", 0, ("w", "lifted_0", "products"), "solve_iteratively", Var("information"),
                   recursion_formula(b, last, a.TARGET), players, b.plan.columns, b.plan.tolerance,
                   note=f"w ({equation.source}): of every stage")  # fmt: skip
            figures["products"] = Var("products")
        else:
            whole = system = f"lambda_{last}"
            if b.plan.reach:
                system, information = "lambda_reached", Var("information_reached")
                reach = Apply("+", (b.plan.reach, Var("early"))) if b.plan.early else b.plan.reach
                b.emit("joint", 0, (system, information.name), "reached", Var(whole), Var("information"),
                       reach, Var("targets"), note="Lambda_0 = Lambda_T / c + Gamma")  # fmt: skip
                b.emit("joint", 0, (), "m.keep", len(b.plan.stages), information=information)
            scale = () if b.factored else (information,)
            b.emit("joint", 0, (f"factor_{last}", f"lifted_{last}"), "factor", Var(system), *scale,
                   note="Cholesky, the only one")  # fmt: skip
            code = recursion_formula(b, last, equation.expression)
            b.emit("joint", 0, "w", "=", code, note=f"w ({equation.source}): of every stage")
        if b.plan.max_step is not None:
            target = recursion_formula(b, last, a.TARGET)
            b.emit("joint", 0, "w_capped", "cap_step", Var("w"), target, information, Var("tau"),
                   Var("rows"), b.plan.max_step, note="|delta u|_M at most max_step")  # fmt: skip
        b.emit("joint", 0, (), "m.keep", 0, **figures, weights=Var(_weights(b)))
    if b.plan.max_grad_norm is not None:
        updates.clipped(b, _weights(b))


def _weights(b: Builder) -> str:
    """The variable of the weights that every stage takes."""
    return "w" if b.plan.max_step is None else "w_capped"


def _update(b: Builder, stage: StagePlan) -> None:
    """One weighted gradient a player, and the base method; nobody has to move before anybody else."""
    for block in b.plan.alone(stage):
        if b.plan.max_grad_norm is not None:
            updates.update_clipped(b, stage.index, block)
        else:
            updates.decide(b, "joint", stage.index, block, _weights(b))
    if stage.index == 0:
        alike.updated(b, _weights(b))


def _decide(b: Builder, stage: StagePlan) -> None:
    """``w``, one weighted gradient a player, and the base method."""
    t = stage.index
    expression = b.plan.form.forward["w"].expression
    if stage.feeds:
        change = total([Var(b.contraction(c.value, c.reader)) for c in stage.feeds])
        clip, rest = ("clip_factors", (Var("rank"),)) if b.factored else ("clip", (Var("aim"),))
        b.emit("forward", t, f"c_{t}", clip, change, b.plan.clip, *rest,
               note="c: the change the stages before have caused")  # fmt: skip
        b.emit("forward", t, (), "m.keep", t, change=Var(f"c_{t}"), predicted=change)
    else:
        expression = expression.subs(a.CHANGE, 0 * a.CHANGE).doit()
    source = b.plan.form.forward["w"].source
    b.emit("forward", t, f"w_{t}", "=", recursion_formula(b, t, expression), note=f"w ({source})")
    b.emit("forward", t, (), "m.keep", t, weights=Var(f"w_{t}"))
    for block in stage.blocks:
        updates.decide(b, "forward", t, block, f"w_{t}")


def _run_again(b: Builder, stage: StagePlan, function: StageFunction, last_read: Mapping[str, int]) -> None:
    """The layer itself with its new parameters, and how far it moved each sample's loss.

    ``last_read``: the last stage of the forward sweep that reads a value, by name (a parameter expression reads where
    it is used).
    """
    t = stage.index
    if stage.rerun:
        arguments = [Var(b.new(value)) for value in function.inputs]
        needed = _read_again(b, t, last_read)
        writes = tuple(b.new(name) if name in needed else "_" for name in function.returns)
        b.emit("forward", t, writes, function.name, Var("q"), Var("b_again"), *arguments, note=f"x' = f_{t}(x', u')")
    for contraction in stage.contracts:
        contract(b, t, contraction)


def _read_again(b: Builder, t: int, last_read: Mapping[str, int]) -> set[str]:
    """Values of a stage that the forward sweep reads after it."""
    contracted = {c.value for c in b.plan.stages[t].contracts}
    return {
        name for name in b.graph.stages[t].ops if name in contracted or name in b.orders or last_read.get(name, t) > t
    }
