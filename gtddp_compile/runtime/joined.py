"""The base method of a step whose batch several ranks share (``passes.p11_distribute``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile import kernels
from gtddp_compile.errors import CompileError
from gtddp_compile.graph_batches import GraphBatches
from gtddp_compile.options import Nystrom, Options
from gtddp_compile.runtime.method import BaseMethod, GivenUp
from gtddp_compile.runtime.ranks import Ranks
from gtddp_compile.runtime.shards import is_shard
from gtddp_compile.terms import Terms


def check_shared(options: Options, model: nn.Module, ranks: Ranks | None) -> None:
    """Refuse what is not made over ranks."""
    if ranks is None:
        if options.coupling == "local":
            raise CompileError("coupling='local' is a group a rank, and there is one process",
                               "Pass process_group='world', or a group size as coupling")  # fmt: skip
        divided = [name for name, p in model.named_parameters() if is_shard(p)] if options.compile is not False else []
        if divided:
            raise CompileError(f"compile={options.compile!r}: parameter {divided[0]!r} is divided by fully_shard, over "
                               "one rank, and gathering is not taken into a graph", "Leave compile or fully_shard out",
                               module=divided[0].rpartition(".")[0])  # fmt: skip
        return
    why = "over the ranks of a process group there is the linear rollout alone, of the fast backend"
    refused = (
        ("backend", options.backend != "fast", why),
        ("feedback", options.feedback == "open", why),
        ("rollout", options.feedback is not False and options.rollout_kind != "linear", why),
        ("coupling", options.coupling not in ("full", "local"), "groups over ranks are all samples, or one a rank"),
        ("gram", isinstance(options.gram, Nystrom), "products with Γ are not shared among ranks"),
        ("terminal", options.factored, "columns of the terminal factor are not shared among ranks"),
        ("compile", options.compile is not False, "collectives are not taken into a graph"),
        ("line_search", options.line_search is not None, "a length is chosen on one batch, and a rank has a shard"),
    )
    if isinstance(model, Terms):
        raise CompileError("process_group with Terms: sets of points are not split among ranks", "Leave it out")
    if isinstance(model, GraphBatches) and None in model.rooms:
        raise CompileError("process_group with GraphBatches: ranks pad their graphs to different sizes",
                           "Give GraphBatches nodes= and edges=")  # fmt: skip
    for option, is_refused, said in refused:
        if is_refused:
            raise CompileError(f"process_group with {option}={getattr(options, option)!r}: {said}",
                               "Leave one of them out")  # fmt: skip


class JoinedMethod(BaseMethod):
    """What programs over several ranks call ``m``.

    Attributes:
        ranks: of the step.
        samples_all: of all ranks together.
    """

    ranks: Ranks
    samples_all = 0
    _mean: Tensor
    _leasts: Tensor
    _excess: Tensor

    @property
    def share(self) -> float:
        """The rank's part of the samples."""
        return self.ranks.share

    def among(self, ranks: Ranks) -> JoinedMethod:
        """Itself, as one of the ranks, at the beginning of a step."""
        self.ranks = ranks
        return self

    # --- losses -------------------------------------------------------------------------------------------------------

    def _refuse_nonfinite(self) -> None:
        """A rank does not stop alone: :meth:`joined_losses` looks at all of them."""

    def joined_losses(self, outputs: Any, targets: Any) -> tuple[Tensor, int]:
        """``φ`` of the rank's samples as the joined batch has it, and how many samples that has.

        A class loss's mean divides by the weights of the targets that count: by those of all ranks.

        Raises:
            GivenUp: the loss of the joined batch is not finite; on every rank.
        """
        phi = self.losses(outputs, targets)
        own, b, excess = phi.detach().double(), phi.shape[0], self.above(phi, outputs, targets).detach()
        divided = self._loss.divisor(outputs, targets)
        weight = own.new_tensor(float(b)) if divided is None else divided.to(own)
        table = self.ranks.tables(
            torch.stack(
                [own.new_tensor(float(b)), weight, own.sum(), excess.double().abs().sum(), excess.double().min()]
            )
        )
        sizes, weights, sums, excesses, leasts = table.unbind(1)
        self.ranks.sizes = tuple(int(size) for size in sizes.tolist())
        self.samples_all = total = sum(self.ranks.sizes)
        factors = (total / weights.sum()) * weights / sizes
        self._mean, self._leasts = (factors * excesses).sum() / total, factors * leasts
        self.loss = ((factors * sums).sum() / (total if self.reduction == "mean" else 1)).to(phi.dtype)
        super()._refuse_nonfinite()
        factor = 1.0 if divided is None else factors[self.ranks.rank].to(phi.dtype)
        self._excess = excess * factor
        return phi * factor, total

    def joined_above(self, phi: Tensor, outputs: Any, targets: Any) -> Tensor:
        """:meth:`above` of the joined batch, this rank's samples of it; found with the losses."""
        return self._excess

    def joined_terminal(
        self, phi: Tensor, kind: str, aim: float = 1.0, own: float = 0.0, half: float = 0.0, group: str | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """The terminal value function of the joined batch, this rank's samples of it (``kernels.terminal``).

        ``group="rank"``: groups are shards, and the longest is the size that the aim goes by.
        """
        ones, values, start = kernels.terminal(phi, self.reduction, "gradient")
        start = 1.0 / self.samples_all if self.reduction == "mean" else start
        if kind == "gradient":
            return ones, values, start
        together = max(self.ranks.sizes) if group == "rank" else self.samples_all
        own_phi, least = phi.detach().to(ones.dtype), self._leasts[self.ranks.rank] if group else self._leasts.min()
        mean, least = self._mean.to(ones.dtype), least.to(ones.dtype)
        return ones, kernels.terminal_aims(own_phi, mean, least, (aim, own, half), together), start

    # --- collectives --------------------------------------------------------------------------------------------------

    def all_reduce(self, sums: Any) -> Any:
        """The sum over ranks of a tensor, or of each in nested tuples."""
        return self.ranks.all_reduce(sums)

    def all_samples(self, own: Any) -> Any:
        """What every rank has of its samples, one rank after the other."""
        return self.ranks.all_samples(own)

    def own_samples(self, whole: Tensor) -> Tensor:
        """The rank's part of a vector over all samples."""
        return self.ranks.own_samples(whole)

    def samples_at(self, owner: int, own: Any) -> Any:
        """:meth:`all_samples` at one rank; ``None`` at the others."""
        return self.ranks.all_samples(own, owner)

    def made_at(self, owner: int, kernel: Callable[..., Any], *args: Any, **options: Any) -> tuple[Tensor, ...]:
        """``Γ`` or a diagonal, made at one rank; zeros ``(B, B)`` at the others, to be added up."""
        if owner == self.ranks.rank:
            found: tuple[Tensor, ...] = kernel(*args, **options)
            return found
        like = kernels.wide(next(iter(self._params.values())))
        return (like.new_zeros(self.samples_all, self.samples_all),)

    def agree(self, weights: Tensor) -> None:
        """No parameter has moved yet: whether every rank's ``w`` is finite."""
        failed = (~weights.isfinite().all()).to(torch.float32).reshape(1)
        if float(self.ranks.all_reduce(failed)):
            assert self.loss is not None
            raise GivenUp(self.loss)
