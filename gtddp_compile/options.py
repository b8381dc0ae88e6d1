"""The compile options, checked once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from gtddp_compile.algebra.derivation import RECURSIONS, Recursion
from gtddp_compile.algebra.forms import Rollout
from gtddp_compile.errors import CompileError
from gtddp_compile.methods.curvature import Curvature
from gtddp_compile.methods.terminal import Geometric, MonteCarlo, Terminal, geometric_of, is_rank_one, terminal_weight

Feedback = Literal["open"] | bool
Backend = Literal["fast", "dense"]
Reading = Literal["block", "exact"]
Memory = Literal["keep", "recompute"]
OnNonFinite = Literal["raise", "skip"]
Running = Literal["corrected", "model"]


@dataclass(frozen=True)
class Sketch:
    """Gram matrices from gradients multiplied by random signs, where that is cheaper than the exact ones.

    Unbiased over the signs, positive semidefinite, entries good to about ``√(2 / columns)``; a diagonal metric is
    separated first (``gram="separable"``). Do not use it to compare with the dense backend, nor for layers without
    positions and a spherical metric: their exact Gram matrix is cheaper still, and is taken.

    Attributes:
        columns: signs a layer input.

    Raises:
        CompileError: not a positive number of columns.
    """

    columns: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.columns, bool) or not isinstance(self.columns, int) or self.columns < 1:
            raise CompileError(f"Sketch has columns={self.columns!r}", "Give a number of columns of at least 1")


@dataclass(frozen=True)
class Nystrom:
    """The joint step without its Gram matrix: conjugate gradients, preconditioned by the columns of some samples.

    Nyström's approximation, by samples chosen anew every step. The step is the exact one to the tolerance; its price
    grows with samples times columns, and few products are needed where no more eigenvalues of the Gram matrix than
    columns are above the damping: least squares over many points in few dimensions (docs/physics.md). Do not use it
    where every sample says something of its own (classification, many dimensions): where eight do not do,
    four times as many columns are made, in the end all (``diagnostics["products"]``).

    Attributes:
        columns: samples whose columns are made, at most; all of a batch that has no more.
        tolerance: of the residual, beside that of no step.

    Raises:
        CompileError: not a positive number of columns, or no tolerance between 0 and 1.
    """

    columns: int = 128
    tolerance: float = 3e-3

    def __post_init__(self) -> None:
        if isinstance(self.columns, bool) or not isinstance(self.columns, int) or self.columns < 1:
            raise CompileError(f"Nystrom has columns={self.columns!r}", "Give a number of columns of at least 1")
        if not 0 < self.tolerance < 1:
            raise CompileError(f"Nystrom has tolerance={self.tolerance!r}", "Give a number between 0 and 1")


Gram = Literal["auto", "exact", "separable"] | Sketch | Nystrom

CHOICES: dict[str, tuple[object, ...]] = {
    "feedback": (True, "open", False), "recursion": RECURSIONS, "backend": ("fast", "dense"),
    "mixing": ("block", "exact"), "cooperative": (True, False, None), "memory": ("keep", "recompute"),
    "rollout": ("linear", "nonlinear", None), "on_nonfinite": ("raise", "skip"),
    "running_statistics": ("corrected", "model", None),
}  # fmt: skip
"""Options that are one of a few words."""


@dataclass(frozen=True)
class Options:
    """What :func:`gtddp_compile.compile_optimizer` was asked for, apart from model, loss and curvature.

    Attributes are the options of :func:`gtddp_compile.compile_optimizer`, which says what each does. ``mixing`` is the
    dense backend's reading of operations that mix samples (docs/theory.md#mixing): ``"block"``, as the fast backend, or
    ``"exact"``.
    """

    feedback: Feedback = True
    feedback_clip: float | None = 1.0
    schedule: str | Mapping[str, int] = "asap"
    coupling: str | int = "full"
    recursion: Recursion = "levenberg"
    terminal: Terminal | None = None
    backend: Backend = "fast"
    mixing: Reading = "block"
    cooperative: bool | None = None
    gram: Gram = "auto"
    memory: Memory = "keep"
    compile: bool | Mapping[str, Any] = False
    rollout: Rollout | None = None
    inertia: float | None = None
    lookahead: float | None = None
    averaging: float | None = None
    max_step: float | None = None
    line_search: tuple[float, ...] | None = None
    max_grad_norm: float | None = None
    on_nonfinite: OnNonFinite = "raise"
    running_statistics: Running | None = None

    def __post_init__(self) -> None:
        for option, choices in CHOICES.items():
            if not _is_one_of(getattr(self, option), *choices):
                raise _unknown(option, getattr(self, option), " or ".join(map(repr, choices)))
        for option, allowed, said in self._values():
            if not allowed:
                raise _unknown(option, getattr(self, option), said)
        for conflict, why, remedy in self._conflicts():
            if conflict:
                raise CompileError(why, remedy)

    def _values(self) -> Iterator[tuple[str, bool, str]]:
        """Options that are no words, whether their values are allowed, and which are."""
        terminal, gram, grid = self.terminal, self.gram, self.line_search
        group = not isinstance(self.coupling, bool) and isinstance(self.coupling, int) and self.coupling >= 1
        known = terminal in (None, "geometric", "gradient", "ggn") or isinstance(terminal, MonteCarlo | Geometric)
        made = gram in ("auto", "exact", "separable") or isinstance(gram, Sketch | Nystrom)
        words = "'full', 'block', 'local' (a group a rank of a process group) or a group size of at least 1"
        yield "coupling", group or self.coupling in ("full", "block", "local"), words
        yield "terminal", known, "'geometric', Geometric(aim, own), 'gradient', 'ggn' or MonteCarlo(rank)"
        yield "compile", isinstance(self.compile, bool | Mapping), "True, False or a mapping of torch.compile's options"
        yield "gram", made, "'auto', 'exact', 'separable', Sketch(columns) or Nystrom(columns)"
        for option in ("inertia", "lookahead"):
            value = getattr(self, option)
            fading = value is None or (_is_number(value) and 0 <= value < 1)
            yield option, fading, "a number that is at least 0 and less than 1, or None"
        newest = self.averaging is None or (_is_number(self.averaging) and (self.averaging == 0 or self.averaging >= 1))
        yield "averaging", newest, "a number that is at least 1, 0 or None"
        for option in ("feedback_clip", "max_step", "max_grad_norm"):
            value = getattr(self, option)
            yield option, value is None or (_is_number(value) and value > 0), "a positive number or None"
        lengths = grid is None or (
            isinstance(grid, tuple | list) and bool(grid) and all(_is_number(step) and step > 0 for step in grid)
        )
        yield "line_search", lengths, "a tuple of positive step lengths, or None"

    def _conflicts(self) -> Iterator[tuple[bool, str, str]]:
        """Whether options exclude each other, why, and what to do."""
        dense, coupled, linear = self.backend == "dense", self._couples, self.rollout_kind == "linear"
        whole = f"backend={self.backend!r}, memory={self.memory!r} has not"
        yield (self.mixing == "exact" and not dense,
               "the exact reading of operations that mix samples is dense",
               "Use backend='dense' with it")  # fmt: skip
        yield (self.mixing == "exact" and self.coupling != "full",
               "the exact reading mixes all samples",
               "Use coupling='full' with it")  # fmt: skip
        yield (self.compile is not False and (dense or self.memory == "recompute"),
               f"compile={self.compile!r} hands the generated step to torch.compile as one graph, which "
               + whole, "Use it with backend='fast' and memory='keep'")  # fmt: skip
        yield (self.memory == "recompute" and dense,
               "memory='recompute': the dense backend keeps every matrix",
               "Use backend='fast' with it")  # fmt: skip
        yield (self.gram not in ("auto", "exact") and (dense or self.recursion != "levenberg" or self.factored),
               f"gram={self.gram!r} approximates the Gram matrices of the fast backend's rank-one form",
               "Use it with backend='fast', recursion='levenberg' and terminal 'gradient' or 'geometric'")  # fmt: skip
        whole_batch = linear and self.coupling == "full" and self.memory == "keep" and self.compile is False
        yield (isinstance(self.gram, Nystrom) and not whole_batch,
               f"gram={self.gram!r} is the joint step of a whole batch",
               "Use it with rollout='linear', feedback=True, coupling='full' and memory='keep', without "
               "compile")  # fmt: skip
        yield (self.rollout == "linear" and self.feedback is not False and not (self.feedback is True and coupled),
               "rollout='linear' is the joint step of all stages, and there is none with "
               f"feedback={self.feedback!r}, coupling={self.coupling!r}, recursion={self.recursion!r}",
               "Use feedback=True, recursion='levenberg' and coupling='full' or a group size with it, or leave it "
               "out")  # fmt: skip
        yield (bool(self.inertia) and not (self.feedback and coupled),
               f"inertia={self.inertia!r} is momentum inside the model of coupled samples, which this program has not",
               "Use it with feedback, recursion='levenberg' and coupling='full' or a group size; a base method has "
               "its own option momentum")  # fmt: skip
        yield (bool(self.averaging) and not self.averages,
               f"averaging={self.averaging!r}: parameters hold an average, and without a joint step, or with "
               "line_search, the newest are read before the step is over",
               "Use it with rollout='linear' and feedback=True, without line_search")  # fmt: skip
        yield (self.max_step is not None and not linear,
               f"max_step={self.max_step!r} caps the joint step, and this program decides stage by stage",
               "Use it with rollout='linear' and feedback=True")  # fmt: skip
        yield (bool(geometric_of(self.terminal_kind).reach) and (not linear or isinstance(self.gram, Nystrom)),
               f"terminal={self.terminal!r}: its reach is of the joint step's whole Gram matrix, which this program "
               "does not make",
               "Use it with rollout='linear', feedback=True and without Nystrom, or leave reach out")  # fmt: skip
        yield (bool(geometric_of(self.terminal_kind).early) and self.inertia is not None and not self.inertia,
               f"terminal={self.terminal!r}: early counts the steps that inertia counts, and there is none",
               "Give inertia with it, or leave early out")  # fmt: skip
        yield (self.max_step is not None and self.factored,
               f"max_step={self.max_step!r} shortens the weights of samples, and with terminal={self.terminal!r} the "
               "gradient is kept apart from them",
               "Use it with terminal 'geometric' or 'gradient'")  # fmt: skip
        yield (self.max_grad_norm is not None and self.feedback is not False and not linear,
               f"max_grad_norm={self.max_grad_norm!r}: the norm is that of all parameters' weighted gradients, and "
               "here a stage's is known when the stages before have moved",
               "Use it with rollout='linear', or with feedback=False")  # fmt: skip
        yield (self.max_grad_norm is not None and (dense or self.memory == "recompute"),
               f"max_grad_norm={self.max_grad_norm!r} needs every weighted gradient before the first update, which "
               + whole, "Use it with backend='fast' and memory='keep'")  # fmt: skip

    @property
    def terminal_kind(self) -> Terminal:
        """How the loss is expanded: ``"geometric"``, but the paper's own recursions keep the paper's ``"gradient"``."""
        return self.terminal or ("geometric" if self.recursion == "levenberg" else "gradient")

    @property
    def carried(self) -> dict[str, Any]:
        """What every parameter group says of the steps before; nothing without inertia."""
        if not self.inertia:
            return {}
        return {"inertia": self.inertia, "lookahead": self.lookahead or 0.0, "averaging": self.averaging or 0.0}

    @property
    def averages(self) -> bool:
        """Whether parameters can hold an average: where nothing between two of them reads the newest."""
        return self.rollout_kind == "linear" and self.feedback is True and self.line_search is None

    @property
    def paced(self) -> bool:
        """Whether a falling learning rate shortens the step itself: where an aim would make up for it."""
        return self.feedback is not False and terminal_weight(self.terminal_kind)[0] == "geometric"

    @property
    def papers_scale(self) -> bool:
        """Whether ``V_xx = V_x V_xᵀ`` at the end, sample by sample: Proposition 5 in the paper's own recursions."""
        return self.recursion != "levenberg" and self.terminal_kind == "gradient"

    @property
    def factored(self) -> bool:
        """Whether the terminal factor has columns of its own, apart from the gradient."""
        return not is_rank_one(self.terminal_kind)

    @property
    def gram_kind(self) -> str:
        """Which Gram matrices the cost model may choose from: those of the rank-one form can be approximated."""
        if isinstance(self.gram, Sketch | Nystrom):
            return "sketch" if isinstance(self.gram, Sketch) else "nystrom"
        return "exact" if self.gram == "auto" and (self.factored or self.recursion != "levenberg") else self.gram

    @property
    def _couples(self) -> bool:
        """Whether the samples of a batch or group are coupled by one matrix."""
        return self.recursion == "levenberg" and self.coupling != "block"

    @property
    def rollout_kind(self) -> Rollout:
        """``"linear"`` by default where the stages have a joint step: not for the paper's recursions or open gains."""
        return self.rollout or ("linear" if self.feedback is True and self._couples else "nonlinear")

    @property
    def cooperates(self) -> bool:
        """Whether coalitions use cross terms: by default unless feedback is off, which is exactly the base method."""
        return bool(self.feedback) if self.cooperative is None else self.cooperative

    @property
    def coupling_kind(self) -> Literal["full", "groups", "block"]:
        """Which kind of coupling it is."""
        if isinstance(self.coupling, int) or self.coupling == "local":
            return "groups"
        return "block" if self.coupling == "block" else "full"


SUGGESTED: Mapping[str, Mapping[str, Any]] = {
    "foof": {
        "inertia": 0.9,
        "lookahead": 0.8,
        "averaging": 20.0,
        "terminal": Geometric(aim=0.75, half=24.0, reach=0.1, deep=4.0, early=1.0),
        "running_statistics": "corrected",
    }
}
"""By curvature: what docs/robustness.md found to serve every network and batch size it tried."""


def own_momentum(settings: Mapping[str, Any]) -> Any:
    """A base method's own memory of steps, by its options; beside inertia it is refused."""
    betas = settings.get("betas")
    return settings.get("momentum", 0) or (betas[0] if isinstance(betas, tuple | list) and betas else 0)


def suggested(options: Options, curvature: Curvature) -> Options:
    """The options with what the curvature suggests where nothing was said: inertia, look-ahead, average, aim,
    statistics.

    Raises:
        CompileError: inertia beside a momentum of the base method, or look-ahead or an average without inertia.
    """
    moved = own_momentum(curvature.defaults())
    if options.inertia and moved:
        raise CompileError(
            f"inertia={options.inertia!r} beside {curvature.name}'s own momentum {moved!r}: two memories of one step",
            "Leave one out (momentum=0, or betas=(0, …), for inertia)",
        )
    known = SUGGESTED.get(curvature.name, {}) if options.feedback is True and options._couples else {}
    inertia = options.inertia if options.inertia is not None else 0.0 if moved else known.get("inertia", 0.0)
    lookahead = options.lookahead
    if lookahead is None:
        lookahead = known.get("lookahead", 0.0) if options.inertia is None and inertia else 0.0
    if lookahead and not inertia:
        raise CompileError(
            f"lookahead={lookahead!r} without inertia: there is no step before that leads anywhere",
            "Give inertia with it, or leave it out",
        )
    if options.averaging and not inertia:
        raise CompileError(
            f"averaging={options.averaging!r} without inertia: nothing counts steps",
            "Give inertia with it, or leave it out",
        )
    averaging = options.averaging
    if averaging is None:
        averaging = known.get("averaging", 0.0) if inertia and options.averages else 0.0
    terminal = known.get("terminal")
    if terminal is not None and options.rollout_kind != "linear":
        terminal = replace(terminal, reach=0.0)  # of the joint step
    if terminal is not None and not inertia:
        terminal = replace(terminal, early=0.0)  # nothing counts steps
    return replace(
        options,
        inertia=inertia,
        lookahead=lookahead,
        averaging=averaging,
        terminal=options.terminal or terminal,
        running_statistics=options.running_statistics or known.get("running_statistics"),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_one_of(value: object, *choices: object) -> bool:
    """Whether it is one of them and of its type: 1 equals True, but is not what the passes look for."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _unknown(option: str, value: object, choices: str) -> CompileError:
    return CompileError(f"option {option}={value!r} is not known", f"Choose {choices}")
