"""What a base method has to provide: its curvature ``Q_uu`` (Table 1) and how it consumes a gradient.

A curvature is an immutable object of options with torch.optim's names and defaults. All methods are pure: they return
new state and leave the old one as it was, so that a failed step changes nothing. Tensors in a state are keyed as
torch.optim keys them (``"exp_avg"``, ``"square_avg"``, ``"momentum_buffer"``, ``"step"``).

With ``g_stat = Q_u = γᵀ α_{t+1} + ℓ_u`` (what statistics are taken from) and ``ĝ = γᵀ w + ℓ_u`` (what takes the
gradient's place in the update), the three calls of one step are, for each parameter::

    state  = c.observe(param, g_stat, state, group)          # second moments, step count
    m_inv  = c.inverse_metric(param, state, group)           # M⁻¹ = η / D, learning rate included
    delta, state = c.apply(param, g_hat, state, group)       # first moment / momentum, then the parameter change

With feedback off ``g_stat = ĝ = ∂J/∂u (+ ℓ_u)`` and the three together are torch.optim's own update (Proposition 4).
``ℓ_u`` is the gradient of coupled weight decay, ``λ u``: :meth:`linear_term`. Decoupled decay (AdamW) is part of
``delta``.

A diagonal method writes five members: ``name``, ``init_state`` (``numbers.zeros`` makes torch's ``"step"`` and zeros),
``observe``, ``denominator`` and ``move``. The others follow from them, and from that:

* ``observe`` and ``denominator`` are elementwise: they may be called with some rows of a parameter, of its gradient and
  of the state's tensors (0-d ones are whole: ``"step"``);
* while torch traces (``torch.compiler.is_compiling()``) no value can be read: not ``step.item()``;
* an exported program carries the text of the method's file: it imports torch, this module and ``numbers``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from gtddp_compile.errors import CompileError
from gtddp_compile.methods.curvature.numbers import Scalar, number, out_of_range, scalar

Group = Mapping[str, Any]
"""Options of one param_group (lr, weight_decay, …), as torch.optim keeps them."""

State = Mapping[str, Any]
"""State of one parameter."""

MetricKind = Literal["spherical", "diagonal", "turned", "turned diagonal", "kronecker"]
"""``"turned"``: a number in coordinates that a parameter has of its own (:class:`gtddp_compile.kernels.Turned`)."""


class Move(NamedTuple):
    """``δu = -rate · above / below - decay · u`` (``None``: ones; zero), and the state after it."""

    above: Tensor
    below: Tensor | None
    rate: Scalar
    state: dict[str, Any]
    decay: Scalar | None = None

    def change(self, param: Tensor) -> Tensor:
        """``δu``, of the parameter's shape."""
        delta = (self.above if self.below is None else self.above / self.below) * -scalar(self.rate, param)
        return delta if self.decay is None else delta - param * self.decay

    def add_to(self, param: Tensor) -> None:
        """``u + δu`` in place, in one pass where the rate is a number."""
        if self.decay is not None:
            param.mul_(1 - self.decay)
        if isinstance(self.rate, Tensor):
            above = self.above if self.below is None else self.above / self.below
            param.sub_(above * scalar(self.rate, param))
        elif self.below is None:
            param.sub_(self.above, alpha=self.rate)
        else:
            param.addcdiv_(self.above, self.below, value=-self.rate)


def with_momentum(direction: Tensor, state: State, group: Group) -> Move:
    """``δu = -lr · b``, ``b ← momentum · b + direction`` (torch.optim.SGD's), ``direction = M⁻¹ ĝ / lr``."""
    if group["momentum"] == 0:
        return Move(direction, None, group["lr"], dict(state))
    buffer = direction + state["momentum_buffer"] * group["momentum"] if "momentum_buffer" in state else direction
    return Move(buffer, None, group["lr"], {**state, "momentum_buffer": buffer})


@dataclass(frozen=True)
class Curvature(ABC):
    """A base method (docs/theory.md#curvatures; Table 1 of the paper).

    A diagonal one of your own writes ``name``, ``init_state``, ``observe``, ``denominator`` and ``move``, as a frozen
    dataclass of its options, and is given as an object. Exports but for ``.tex`` carry the package's own alone.

    Attributes:
        name: for the user.
        metric: shape of ``M``: of one parameter a multiple of the identity or diagonal, there or turned, or of players,
            Kronecker-factored (:class:`gtddp_compile.methods.curvature.kronecker.Kronecker` has further methods).
        needs_statistics: whether :meth:`observe` reads ``g_stat``; if not, the program need not compute it.
        nonnegative: options that are numbers of at least 0.
        later: options that states saved by an earlier version do not have.
    """

    name: ClassVar[str]
    metric: ClassVar[MetricKind] = "diagonal"
    needs_statistics: ClassVar[bool] = True
    nonnegative: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    later: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self.check(self.defaults())

    def defaults(self) -> dict[str, Any]:
        """Options of a param_group, torch.optim's names and values."""
        return asdict(self)

    def check(self, options: Group) -> None:
        """Refuse options out of torch.optim's range.

        Raises:
            CompileError: names the option.
        """
        name = type(self).__name__
        if options.get("maximize"):
            raise CompileError(
                f"{name} was asked for maximize=True, but the recursions minimise the loss",
                "Negate the loss instead: loss=lambda outputs, targets: -gain(outputs, targets)",
            )
        for option in self.defaults().keys() - options.keys():
            raise CompileError(f"{name} has no {option} in this parameter group", f"Give group[{option!r}] a value")
        for option in self.nonnegative:
            if not number(name, option, options[option]) >= 0.0:
                raise out_of_range(name, option, options[option], "a number that is at least 0")

    @abstractmethod
    def init_state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """State of one parameter before the first step, torch.optim's keys; refuses options out of range."""

    def reads_values(self, group: Group) -> bool:
        """Whether a parameter's value counts in what these methods find, and not its shape and precision alone."""
        return True

    def linear_term(self, param: Tensor, group: Group) -> Tensor | None:
        """``ℓ_u = λ u`` of coupled weight decay, shape of the parameter; ``None`` where there is none."""
        decay = group["weight_decay"]
        return None if decay == 0 else param * scalar(decay, param)

    @abstractmethod
    def observe(self, param: Tensor, g_stat: Tensor | None, state: State, group: Group) -> dict[str, Any]:
        """The state after statistics were updated from ``g_stat`` (which contains ``ℓ_u``)."""

    def inverse_metric(self, param: Tensor, state: State, group: Group) -> Tensor | float:
        """``M⁻¹``: a float or 0-d tensor (spherical), or a tensor of the parameter's shape (diagonal)."""
        denominator = self.denominator(param, state, group)
        assert denominator is not None  # other metrics have a method of their own
        return self.inverse_of(denominator, group)

    def inverse_of(self, denominator: Tensor, group: Group) -> Tensor:
        """``η / D``, a new tensor."""
        return denominator.reciprocal().mul_(group["lr"])

    def denominator(self, param: Tensor, state: State, group: Group) -> Tensor | None:
        """``D = η M`` of a diagonal metric, a new tensor of the parameter's shape; ``None``: the metric is another.

        ``M⁻¹ = η / D`` with ``η = group["lr"]``, :meth:`inverse_of`: what changes the rate from step to step (Adagrad's
        ``lr_decay``) is a factor of ``D``.
        """
        return None

    @abstractmethod
    def move(self, param: Tensor, g_hat: Tensor, state: State, group: Group, denominator: Tensor | None = None) -> Move:
        """What ``δu`` is made of once the first moment consumed ``ĝ``. ``denominator``: ``D`` where it is known."""

    def apply(self, param: Tensor, g_hat: Tensor, state: State, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """``δu`` and the state after it."""
        move = self.move(param, g_hat, state, group)
        return move.change(param), move.state

    def rate(self, group: Group) -> float | None:
        """``η`` where ``δu = -η ĝ`` with no state and no ``ℓ_u``, so that a product may add it up; else ``None``."""
        return None
