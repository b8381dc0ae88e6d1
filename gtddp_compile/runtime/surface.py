"""torch.optim's surface, where a derived program makes it another: groups, and what is pickled."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import unwrap
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import tool
from gtddp_compile.methods.curvature import Curvature
from gtddp_compile.options import Options
from gtddp_compile.runtime.compiler import Specialisations
from gtddp_compile.runtime.diagnostics import Diagnostics
from gtddp_compile.runtime.model import ModelView
from gtddp_compile.runtime.precision import lift
from gtddp_compile.runtime.ranks import Ranks
from gtddp_compile.runtime.shards import divided
from gtddp_compile.runtime.states import apart, check_loaded, check_steps, completed, regrouped, unround

if TYPE_CHECKING:
    from typing_extensions import Self

    from gtddp_compile.runtime.accumulated import Accumulated


Method = TypeVar("Method", bound=Callable[..., Any])


def one_at_a_time(method: Method) -> Method:
    """Threads wait for each other: what one has put aside is no state for another to begin with. Meanwhile the model
    has whole parameters. An interrupt of an inner ``no_grad`` as it ends leaves gradients off: they are as before.
    """

    @wraps(method)
    def alone(self: Surface, *args: Any, **kwargs: Any) -> Any:
        enabled = torch.is_grad_enabled()
        try:
            with self._lock:
                if self._ranks is not None:
                    self._ranks.sent = {}
                with self._view.shards.together():
                    return method(self, *args, **kwargs)
        except BaseException:
            torch.set_grad_enabled(enabled)
            raise

    return cast(Method, alone)


class Surface(torch.optim.Optimizer):
    """What a compiled optimizer has of ``torch.optim.Optimizer``, and keeps of its model."""

    _view: ModelView
    _options: Options
    _curvature: Curvature
    _ranks: Ranks | None
    _committed: list[Any]
    _pending: Accumulated | None
    _checked: bool

    def __init__(self, groups: Any, defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)
        self._lock, self._committed = RLock(), []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: the program was derived for the parameters the model had."""
        if getattr(self, "_sealed", False):
            raise CompileError(
                "a parameter group cannot be added: the update program was derived for the network as it was compiled",
                "Change the model first, then call compile_optimizer again; load_state_dict carries state over",
            )
        # torch compares a new group with all before it, quadratic in their number; ours are disjoint by construction.
        before, self.param_groups = self.param_groups, []
        # Unwrapped: torch's wrapper hides it from torch.compile, and for that imports torch._dynamo, a second's work.
        unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)
        before += self.param_groups
        self.param_groups = before

    @one_at_a_time
    def feedback_modes(self, player: str, inputs: Any, targets: Any, k: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
        """What a player answers to most: leading singular values and state directions of its feedback matrix.

        ``K̂`` of ``δu = k + K̂ δx̂`` (Eq. 4, 9 and 28 of the paper, batch-augmented) with the weights as they are, by the
        dense backend: for networks of a few thousand activations a batch. Nothing is updated. Fig. 6c of the paper
        projects such directions to image space.

        Args:
            player: its name in ``opt.graph``.
            inputs, targets: a batch, as ``step`` takes it.
            k: how many modes, the strongest first.

        Returns:
            The singular values, shape ``(k,)``, and by live value of the player's cut the directions, ``(k, B, …)``, of
            norm 1 over all values and samples, each up to its sign.

        Raises:
            CompileError: no such player or number of modes, or the optimizer has no feedback, or is of several
                processes.
        """
        found: tuple[Tensor, dict[str, Tensor]] = tool("modes").feedback_modes(self, player, inputs, targets, k)
        return found

    def begun(self) -> bool:
        """Whether states were made as they begin: torch.distributed.checkpoint asks for a step of zero gradients before
        it loads.
        """
        trained = [(p, group) for group in self.param_groups for p in group["params"] if p.requires_grad]
        if self.state or not trained or any(p.grad is None or bool(p.grad.any()) for p, _ in trained):
            return False
        for p, group in trained:
            self.state[p] = self.first_state(p, group)
        return True

    def first_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state before its first step; asked for in one, where parameters are whole."""
        return divided(p, self._curvature.init_state(lift(self._view.shards.inside(p).detach()), group))

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's; a parameter's state may be saved alone and takes no more room than its tensors have."""
        with self._lock:
            apart(self.state)
            return super().state_dict()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop accumulated micro-batches, and the parameters' ``grad``, which a step neither reads nor writes."""
        self._pending = None
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim's, whose own are taken too; accumulated micro-batches are run again with the new state.

        Options are those that were saved; what a saved group does not have stays as it is here.
        """
        state_dict = regrouped(state_dict, self.param_groups, self._view.named, self._curvature)
        check_loaded(state_dict, self.param_groups, self._curvature)
        state_dict = completed(state_dict, self.param_groups)
        check_steps(state_dict["param_groups"], self._curvature, self._options)
        self._checked = False
        super().load_state_dict(state_dict)
        unround(self.state, state_dict, self.param_groups)
        if self._pending is not None:
            self._pending.again()

    def seal(self) -> Self:
        """No more groups from here on."""
        self._sealed = True
        return self

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            apart(self.state)
        # As torch.optim, without what was put over a method: a scheduler's ``step`` is bound to this optimizer.
        state = {key: value for key, value in vars(self).items() if not callable(getattr(type(self), key, None))}
        # Generated functions do not pickle; the next step compiles again from the model that is pickled along.
        fresh = Specialisations(self._view, self._options, self._curvature, self._ranks)
        state.update(_specialisations=fresh, _current=None, _diagnostics=Diagnostics(), _pending=None, _committed=[])
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option in self._curvature.later:
                group.setdefault(option, self._curvature.defaults()[option])
        self._lock = RLock()
