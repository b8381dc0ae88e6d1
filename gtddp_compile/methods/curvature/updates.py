"""What one step does with the base method, for parameters by name: statistics, metric, update.

Exported programs carry this text with them (``gtddp_compile.tools.export``), so it needs torch and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.kernels.approximate import separated
from gtddp_compile.kernels.bundle import Layer, wide
from gtddp_compile.kernels.sweep import several_entries
from gtddp_compile.kernels.turned import Turned, as_matrix, inverse_times
from gtddp_compile.methods.curvature.base import Curvature, Move
from gtddp_compile.methods.curvature.numbers import Scalar, counted

RAMP = 3.0
"""Steps after which inertia is half of what it tends to (but for its cap): the first steps are no average yet, and in
networks without normalisation an early one that is carried on leads astray (docs/robustness.md)."""


class ParameterUpdates:
    """What generated programs call ``m``: parameters and states of one step, kept aside until it is done.

    Args:
        curvature: the base method.
        params: parameters before the step, by name.
        new: dictionary that receives the parameters after it; starts as a copy of ``params``.
        states: optimizer state of every parameter, by name; read, never written.
        groups: options of every parameter, by name.
    """

    def __init__(
        self,
        curvature: Curvature,
        params: dict[str, Tensor],
        new: dict[str, Tensor],
        states: Mapping[str, Mapping[str, Any]],
        groups: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._curvature, self._params, self._new, self._groups = curvature, params, new, groups
        self.states: dict[str, Mapping[str, Any]] = dict(states)
        self._denominators: dict[str, Tensor] = {}
        self._ahead = False

    def observe(self, names: tuple[str, ...], gradients: tuple[Tensor, ...] | None) -> None:
        """Statistics from ``Q_u = γᵀ α + ℓ_u`` (``gradients`` without ``ℓ_u``), and the step count."""
        for index, name in enumerate(names):
            g = None if gradients is None else self._with_decay(name, gradients[index])
            self.states[name] = self._curvature.observe(self._params[name], g, self.states[name], self._groups[name])

    def metric(self, names: tuple[str, ...]) -> tuple[Any, ...]:
        """``M⁻¹`` of each parameter."""
        return tuple(self._inverse(name) for name in names)

    def separated_metric(self, names: tuple[str, ...], groups: int = 1) -> tuple[Any, ...]:
        """``M⁻¹`` of each parameter, a weight's as ``(√r, √c)`` of ``M⁻¹_ab ≈ r_a c_b`` (``kernels.approximate``)."""
        found: list[Any] = []
        for name in names:
            own = self._denominator(name) if self._params[name].dim() > 1 else None
            rate = self._groups[name]["lr"]
            found.append(self._inverse(name) if own is None else separated(own, rate, groups))
        return tuple(found)

    def _inverse(self, name: str) -> Any:
        own = self._denominator(name)
        if own is None:
            return self._curvature.inverse_metric(self._params[name], self.states[name], self._groups[name])
        return self._curvature.inverse_of(own, self._groups[name])

    def _denominator(self, name: str) -> Tensor | None:
        """``D`` of a diagonal metric, kept until the parameter has moved."""
        own = self._curvature.denominator(self._params[name], self.states[name], self._groups[name])
        if own is not None:
            self._denominators[name] = own
        return own

    def rates_in_tensors(self) -> None:
        """``lr`` of every group as a 0-d tensor: torch.compile makes a graph for every value of a number."""
        self._groups = {
            name: {**group, "lr": torch.as_tensor(group["lr"], dtype=torch.float64)}
            for name, group in self._groups.items()
        }

    def look_ahead(self, params: dict[str, Tensor], targets: Any) -> dict[str, Tensor]:
        """``u + μ v`` of every parameter, where the trajectory is run; ``u`` where samples' targets have one number.

        ``u`` is what was given and how far that is behind (docs/theory.md#average). Where it looks ahead, nothing of
        the last step is left to be drawn to from then on (docs/theory.md#look-ahead).
        """
        self._ahead = self._leads(targets)
        found = dict(params)
        for name, state in self.states.items():
            averaged = "behind" in state and "inertia" in self._groups[name]
            if averaged:
                found[name] = self._reached(params[name], state)
                if self._curvature.reads_values(self._groups[name]):
                    self._params[name] = found[name].to(params[name].dtype)
            if self._ahead:
                (last,), mu = self._carrying((name,))
                found[name] = _led(found[name], last, mu)
            found[name] = found[name].to(params[name].dtype)
        return found

    def _reached(self, value: Tensor, state: Mapping[str, Any]) -> Tensor:
        """What ``u`` is ahead of the parameter, added to it or to a ``δu``, which is a step from there then."""
        behind, share = state["behind"], state["share"]
        if torch.compiler.is_compiling() or type(share) is not Tensor:  # as in `counted`
            return _led(value, behind, torch.as_tensor(1.0 - share))
        return _led(value, behind, 1.0 - float(share))

    def _leads(self, targets: Any) -> bool:
        return any(group.get("lookahead") for group in self._groups.values()) and several_entries(targets)

    def early(self, amount: float) -> Any:
        """``amount / k`` in the k-th step, of the parameter that has made most; 0 where no group counts them."""
        if not any("inertia" in group for group in self._groups.values()):
            return 0.0
        counts = [state["taken"] for state in self.states.values() if "taken" in state]
        if not counts:
            return amount
        if torch.compiler.is_compiling() or any(type(count) is not Tensor for count in counts):  # as in `counted`
            return amount / (1.0 + torch.stack(counts).amax())
        return amount / (1.0 + max(map(float, counts)))

    def pace(self) -> Scalar:
        """What a schedule has left of the step: the greatest ratio of a group's ``lr`` to its ``peak_lr``, at most 1.

        ``M⁻¹`` is proportional to ``lr``, and to a mere aim a shorter ``M⁻¹`` is a reason to ask for more. With the aim
        in the same proportion ``w`` stays, and the step shrinks with the rate. Where all rates are 0 nothing moves.
        """
        ratios = [group["lr"] / group["peak_lr"] for group in self._groups.values() if group.get("peak_lr")]
        if not ratios:
            return 1.0
        if any(isinstance(ratio, Tensor) for ratio in ratios):
            most = torch.stack([torch.as_tensor(ratio).detach().reshape(()) for ratio in ratios]).amax()
            return torch.where(most > 0, most, 1.0).clamp(max=1.0)
        return min(1.0, max(ratios)) or 1.0

    def last_step(self, names: tuple[str, ...]) -> tuple[tuple[Tensor | None, ...], Tensor | float]:
        """``v``, the last step's ``δu`` of each parameter (zero before the first), and ``μ``, one for all of them.

        ``None`` and 0 where the trajectory is run ahead.
        """
        return ((None,) * len(names), 0.0) if self._ahead else self._carrying(names)

    def _carrying(self, names: tuple[str, ...]) -> tuple[tuple[Tensor, ...], Tensor | float]:
        """``v`` and ``μ`` of what the step adds; parameters with a ``μ`` of their own have it in their ``v``."""
        first, *others = found = [self._inertia(name) for name in names]
        if any(isinstance(mu, Tensor) or mu != first for mu in others):
            parts = ((self._last(name), mu) for name, mu in zip(names, found, strict=True))
            return tuple(torch.zeros_like(last) if mu is None else last * mu for last, mu in parts), 1.0
        return tuple(self._last(name) for name in names), 0.0 if first is None else first

    def _last(self, name: str) -> Tensor:
        """``v``; zero of a parameter that has made no step."""
        last = self.states[name].get("last_step")
        return torch.zeros_like(wide(self._params[name])) if last is None else last

    def drift(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        """``M⁻¹ ℓ_u = M⁻¹ λ u - μ v`` of each parameter."""
        found = []
        for name in names:
            linear = self._linear(name)
            decayed = None if linear is None else inverse_times(self._inverse(name), linear)
            found.append(self._less_inertia(name, decayed))
        return tuple(found)

    def _inertia(self, name: str) -> Tensor | float | None:
        """``μ_k = min(μ, k / (k + RAMP))`` after k steps, less as the rate has fallen; ``None`` before the first."""
        state, mu = self.states[name], self._groups[name].get("lookahead" if self._ahead else "inertia", 0.0)
        if "last_step" not in state or not mu:
            return None
        taken: Tensor = state["taken"]
        now, then = self._rate(name), state.get("rate", self._groups[name].get("peak_lr"))
        if torch.compiler.is_compiling() or type(taken) is not Tensor or isinstance(now, Tensor):  # as in `counted`
            kept = 1.0 if then is None else (now / then).nan_to_num(1.0, 1.0).clamp(max=1.0)  # 0 / 0: there is no v
            return (taken / (taken + RAMP)).clamp_max(mu) * kept
        most, rate = float(mu), math.inf if then is None else float(then)
        return min(most, float(taken) / (float(taken) + RAMP)) * (now / rate if now < rate < math.inf else 1.0)

    def _rate(self, name: str) -> Scalar:
        """What a step is in proportion to: the learning rate, up to its peak where there is one."""
        rate: Scalar = self._groups[name]["lr"]
        peak: float | None = self._groups[name].get("peak_lr")
        if peak is None:
            return rate
        return rate.clamp(max=peak) if isinstance(rate, Tensor) else min(rate, peak)

    def _less_inertia(self, name: str, direction: Tensor | None) -> Tensor:
        """The direction (``None``: zero) less ``μ v``, ``v`` the last step's ``δu``; run ahead, nothing less."""
        mu = None if self._ahead else self._inertia(name)
        if mu is None:
            return torch.zeros_like(wide(self._params[name])) if direction is None else direction
        carried: Tensor = self.states[name]["last_step"] * mu
        return -carried if direction is None else direction - carried

    def _carried(self, name: str, delta: Tensor) -> Tensor:
        """``δu + μ v``, put down as the last step."""
        if "inertia" not in self._groups[name]:
            return delta
        mu = self._inertia(name)
        return self._stepped(name, delta if mu is None else _led(delta, self.states[name]["last_step"], mu))

    def _stepped(self, name: str, delta: Tensor) -> Tensor:
        """``δu``, put down as the last step."""
        state, rate = self.states[name], self._rate(name)
        taken = state["taken"] if "taken" in state else torch.zeros((), dtype=torch.float64)
        then = rate.detach().clone() if isinstance(rate, Tensor) else torch.scalar_tensor(rate, dtype=torch.float64)
        self.states[name] = {**state, "last_step": delta, "taken": counted(taken), "rate": then}
        return delta

    def _move(self, name: str, delta: Tensor) -> None:
        """The new parameter, ``u + δu``, or what the average makes of it."""
        param, (step, share) = self._new[name], self._averaged(name, delta)
        self._new[name] = torch.add(param, step, alpha=share).to(param.dtype)

    def _averaged(self, name: str, delta: Tensor) -> tuple[Tensor, float]:
        """A step of what is in the parameter, and what part of it is taken: ``δu`` and all of it without an average."""
        state, share, param = self.states[name], self._newest(name), self._new[name]
        if "behind" not in state and not isinstance(share, Tensor) and share == 1:
            return delta, 1.0
        whole = self._reached(delta, state) if "behind" in state else delta.clone()
        step, taken = (whole * share.to(whole), 1.0) if isinstance(share, Tensor) else (whole, share)
        if param.dtype in (torch.bfloat16, torch.float16):  # what rounding leaves is left for the next step
            step = torch.add(param, step, alpha=taken).to(param.dtype).to(whole.dtype) - param
            whole, taken, share = whole - step, 1.0, 0.0
        if not isinstance(share, Tensor):
            share = torch.scalar_tensor(share, dtype=torch.float64)
        self.states[name] = {**state, "behind": whole, "share": share}
        return step, taken

    def _newest(self, name: str) -> Tensor | float:
        """What the newest ``u`` counts for in the average, ``min(1, p / k)`` in the k-th step; at rate 0 nothing."""
        most, taken, rate = self._groups[name].get("averaging", 0.0), self.states[name].get("taken"), self._rate(name)
        if not most or taken is None:
            return 1.0
        if torch.compiler.is_compiling() or type(taken) is not Tensor or isinstance(rate, Tensor):  # as in `counted`
            share: Tensor = (most / taken).clamp_max(1.0) * (rate > 0)
            return share
        return min(1.0, most / float(taken)) if rate else 0.0

    def open_gain(self, names: tuple[str, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``k = -M⁻¹ (γᵀ α + ℓ_u)`` (Eq. 4 with Table 1's ``Q_uu``)."""
        pairs = zip(names, gradients, self.metric(names), strict=True)
        return tuple(-inverse_times(inverse, self._with_decay(name, gradient)) for name, gradient, inverse in pairs)

    def apply(self, names: tuple[str, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Consume ``ĝ = γᵀ w + ℓ_u``: new parameters and states are kept aside; ``δu``, run ahead less ``μ v``."""
        return tuple(self._applied(*pair) for pair in zip(names, self._moves(names, gradients), strict=True))

    def descend(self, names: tuple[str, ...], gradients: tuple[Tensor, ...]) -> None:
        """As :meth:`apply` where nobody reads ``δu``: one pass over the new parameter."""
        for name, move in zip(names, self._moves(names, gradients), strict=True):
            self._descended(name, move)

    def _moves(self, names: tuple[str, ...], gradients: tuple[Tensor, ...]) -> Iterator[Move]:
        for name, gradient in zip(names, gradients, strict=True):
            g_hat, known = self._with_decay(name, gradient), self._denominators.pop(name, None)
            yield self._curvature.move(self._params[name], g_hat, self.states[name], self._groups[name], known)

    def _applied(self, name: str, move: Move) -> Tensor:
        """A parameter's change from where the trajectory was run; its new value and state are kept aside."""
        self.states[name] = move.state
        own = move.change(self._params[name])
        delta = self._carried(name, own)
        self._move(name, delta)
        return own if self._ahead else delta

    def _descended(self, name: str, move: Move) -> None:
        """The same where nobody reads ``δu``."""
        self.states[name] = move.state
        if "inertia" in self._groups[name]:
            self._move(name, self._carried(name, move.change(self._params[name])))
        else:
            move.add_to(self._writable(name))

    def descend_by(
        self,
        names: tuple[str, ...],
        weighted: Callable[..., tuple[Tensor, ...]],
        subtract: Callable[..., None],
        layer: Layer,
    ) -> None:
        """:meth:`descend` with the layer's gradient; where ``δu = -η ĝ``, its product writes the parameter itself."""
        rates = self._rates(names)
        if rates is None:
            self.descend(names, weighted(layer))
        else:
            subtract(layer, tuple(self._writable(name) for name in names), rates)

    def _rates(self, names: tuple[str, ...]) -> tuple[float, ...] | None:
        """``η`` of each parameter where ``δu = -η ĝ``, and a product in float32 can write the parameter."""
        if any(self._params[name].dtype in (torch.bfloat16, torch.float16) for name in names):
            return None
        if any("inertia" in self._groups[name] for name in names):
            return None
        rates = tuple(self._curvature.rate(self._groups[name]) for name in names)
        return None if None in rates else rates  # type: ignore[return-value]

    def _writable(self, name: str) -> Tensor:
        """The new parameter, equal to the old one, to be written in place."""
        self._new[name] = self._params[name].clone()
        return self._new[name]

    def _linear(self, name: str) -> Tensor | None:
        return self._curvature.linear_term(self._params[name], self._groups[name])

    def _with_decay(self, name: str, gradient: Tensor) -> Tensor:
        linear = self._linear(name)
        if gradient.dtype in (torch.bfloat16, torch.float16):  # states are float32 at least
            gradient = gradient.float()
        return gradient if linear is None else gradient + linear

    # --- for the dense backend ----------------------------------------------------------------------------------------

    def dense_inverse(self, names: tuple[str, ...]) -> Tensor:
        """``M⁻¹`` of one player whose metric is of parameters, with explicit Kronecker products."""
        found = []
        for name, inverse in zip(names, self.metric(names), strict=True):
            whole = torch.ones_like(self._params[name])
            if not isinstance(inverse, Turned):
                found.append(torch.diag((inverse * whole).flatten()))
                continue
            eyes = map(torch.eye, as_matrix(whole).shape)
            turn = [eye.to(whole) if own is None else own for own, eye in zip(inverse[1::-1], eyes, strict=True)]
            basis = torch.kron(*map(torch.Tensor.contiguous, turn))
            found.append(basis @ torch.diag((inverse.scale * as_matrix(whole)).flatten()) @ basis.T)
        whole_inverse: Tensor = torch.block_diag(*found)
        return whole_inverse

    def linear_flat(self, names: tuple[str, ...]) -> Tensor:
        """``ℓ_u`` of one player, its parameters flat and side by side."""
        found = []
        for name in names:
            decay = self._linear(name)
            found.append((torch.zeros_like(self._params[name]) if decay is None else decay).flatten())
        return torch.cat(found)

    def carried_flat(self, names: tuple[str, ...]) -> Tensor:
        """``μ v`` of one player, its parameters flat and side by side."""
        return torch.cat([-self._less_inertia(name, None).flatten() for name in names])

    def shape(self, name: str) -> torch.Size:
        """A parameter's shape."""
        return self._params[name].shape

    def unflatten(self, names: tuple[str, ...], vector: Tensor) -> tuple[Tensor, ...]:
        """One player's flat column as tensors of its parameters' shapes."""
        pieces = vector.flatten().split([self._params[name].numel() for name in names])
        return tuple(piece.reshape(self._params[name].shape) for name, piece in zip(names, pieces, strict=True))


def _led(value: Tensor, last: Tensor, mu: Tensor | float) -> Tensor:
    """``value + μ v``, in one pass where ``μ`` is a number."""
    return value + last * mu.to(last) if isinstance(mu, Tensor) else torch.add(value, last, alpha=mu)
