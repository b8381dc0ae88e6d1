"""Batches of graphs whose nodes are one list, as torch_geometric's, in a form in which every graph has equally many.

A compiled program has equally many rows a sample. So graphs are padded in the open, and the network runs on the longer
list: a graph's missing nodes are copies of its own, each with no edge but a loop, and belong to a second graph beside
it, whose outputs are dropped. What is padded then has no gradient, and reaches nothing.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gtddp_compile.errors import CompileError

COUNTS = frozenset({"num_graphs", "size", "batch_size"})
"""Arguments of a network that are the number of graphs."""
OWN = COUNTS | {"edge_index", "batch"}
TRIED: WeakKeyDictionary[nn.Module, set[tuple[bool, ...]]] = WeakKeyDictionary()
"""Modes of modules in which a network saw no padding: no attribute, since a change of those compiles again."""
AWAY = 16
"""Parameters that are zero are tried between zero and a sixteenth."""
PASS = "Pass a batch of torch_geometric, or a dict of edge_index, batch and what else the network takes"


class GraphBatches(nn.Module):
    """A network of graphs, each of which is a sample: ``net(x, edge_index, batch, num_graphs)``.

    ``compile_optimizer`` and ``step`` take the graphs as they are: a batch of torch_geometric, or a dict, with
    ``edge_index (2, E)``, ``batch (N,)``, a graph a node, and by name whatever else the network takes: ``(E, …)`` where
    the name begins with ``edge_``, else ``(N, …)``, but not ``(G, …)``. Linear and graph layers, pooling by ``batch``
    and norms of a node or a graph see nothing of the padding, which is tried whenever modules changed mode; a
    batch-norm over nodes does, and is refused. Statistics of Kronecker factors are over all rows, copies among them.

    Args:
        net: gives a row a graph. Its arguments are found by name; with ``num_graphs`` (or ``size``, ``batch_size``) one
            recording serves all batches, where pooling that reads ``batch.max()`` is compiled for each size.
        takes: which arguments, where they are not those without a default and the ones named above.
        nodes, edges: rows of a padded graph, more than any has, for processes that share a batch; by default the most
            that a graph of the batch has, and room for a node more and its loop.
    """

    def __init__(
        self, net: nn.Module, *, takes: tuple[str, ...] | None = None, nodes: int | None = None,
        edges: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        every = inspect.signature(net.forward).parameters.values()
        known = [p for p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        named = takes or tuple(p.name for p in known if p.name in OWN or p.default is p.empty)
        self.net, self.takes, self.rooms = net, named, (nodes, edges)
        self.values = tuple(name for name in named if name not in OWN)

    def forward(self, own: Tensor, ends: Tensor, *values: Tensor) -> Any:
        """A row a graph.

        Args:
            own: ``(G, n)``, false where a node is padding.
            ends: ``(G, 2, e)``, edges by places in their graph.
            values: ``(G, n, …)`` or ``(G, e, …)``, as ``values`` names them.
        """
        graphs, nodes = own.shape
        graph = torch.ones_like(own[:, 0], dtype=torch.long).cumsum(0) - 1
        given = {
            "edge_index": (ends + nodes * graph[:, None, None]).transpose(0, 1).flatten(1),
            "batch": (2 * graph[:, None] + ~own).flatten(),
            **dict.fromkeys(COUNTS, 2 * graphs),
            **{name: value.flatten(0, 1) for name, value in zip(self.values, values, strict=True)},
        }
        output = self.net(**{name: given[name] for name in self.takes})
        return pytree.tree_map(lambda value: value[::2], output)

    def padded(self, data: Any) -> tuple[Tensor, ...]:
        """What :meth:`forward` takes, of graphs as they are; what is padded already, as it is.

        Raises:
            CompileError: something is missing or does not fit, an edge joins two graphs, a graph has no node, or the
                network's outputs depend on what is padded.
        """
        if isinstance(data, tuple) and len(data) == 2 + len(self.values) and data[0].dtype == torch.bool:
            return data
        given = self._given(data)
        batch, edge_index, graphs = given["batch"], given["edge_index"], given["num_graphs"]
        nodes = torch.bincount(batch, minlength=graphs)
        between = batch[edge_index[0]]
        if len(nodes) != graphs or not bool(nodes.all()) or bool((between != batch[edge_index[1]]).any()):
            raise CompileError(f"of {graphs} graphs one has no node, or an edge joins two", "Leave out what has none")
        lacking = int(nodes.max()) + 1 - nodes if self.rooms[0] is None else self.rooms[0] - nodes
        loops = torch.bincount(between, minlength=graphs)
        rooms = int((nodes + lacking)[0]), self.rooms[1] or int((loops + lacking).max())
        if int(lacking.min()) < 1 or bool((loops + lacking > rooms[1]).any()):
            raise CompileError(
                f"a graph of {int(nodes.max())} nodes, or one of {int(loops.max())} edges, does not fit nodes, edges ="
                f" {rooms}",
                "Give room for a node more than any graph has, and a loop for each that is padded",
            )
        taken, own = _slots(batch, nodes, rooms[0])
        place = torch.empty_like(batch)
        place[taken[own]] = torch.arange(rooms[0], device=batch.device).expand_as(own)[own]
        edge, is_edge = _slots(between, loops, rooms[1])
        loop = nodes[:, None] + torch.arange(rooms[1], device=batch.device) - loops[:, None]
        ends = torch.where(is_edge, place[edge_index[:, edge]], loop.clamp(max=rooms[0] - 1)).transpose(0, 1)
        index = {name: edge if name.startswith("edge_") else taken for name in self.values}
        inputs = (own, ends.contiguous(), *(given[name][index[name]] for name in self.values))
        modes, tried = tuple(module.training for module in self.modules()), TRIED.setdefault(self, set())
        if modes not in tried:
            self._try(inputs, given)
            tried.add(modes)
        return inputs

    def _given(self, data: Any) -> dict[str, Any]:
        """By name, with the number of graphs."""
        wanted = {"edge_index", "batch", *self.takes} - COUNTS
        read: Callable[[str], Any] = data.get if isinstance(data, Mapping) else lambda name: getattr(data, name, None)
        found: dict[str, Any] = {name: read(name) for name in sorted(wanted)}
        wrong = [name for name, value in found.items() if not isinstance(value, Tensor)]
        if wrong:
            raise CompileError(f"a {type(data).__name__} has no tensor {wrong[0]!r}", PASS)
        batch, ends = found["batch"], found["edge_index"]
        rows = batch.numel(), ends.shape[-1]
        wrong = [name for name in self.values if found[name].shape[:1] != (rows[name.startswith("edge_")],)]
        fits = all(rows) and batch.shape == rows[:1] and ends.shape == (2, rows[1]) and not wrong
        whole = fits and all(value.dtype == torch.long and int(value.min()) >= 0 for value in (batch, ends))
        if not whole or int(ends.max()) >= rows[0]:
            raise CompileError(f"{rows[0]} nodes and {rows[1]} edges: {', '.join(wrong) or 'they'} do not fit", PASS)
        count = next((int(n) for name in sorted(COUNTS) if isinstance(n := read(name), int | Tensor)), None)
        return {**found, "num_graphs": int(batch.max()) + 1 if count is None else count}

    def _try(self, inputs: tuple[Tensor, ...], given: dict[str, Any]) -> None:
        """Other padding gives the same outputs; and so do the graphs as they are, in evaluation mode."""
        own, ends, *values = inputs
        is_edge, twin = own.gather(1, ends[:, 1]), copy.deepcopy(self)
        masks = (is_edge if name.startswith("edge_") else own for name in self.values)
        others = [_other(value, mask) for value, mask in zip(values, masks, strict=True)]
        given |= dict.fromkeys(COUNTS, given["num_graphs"])
        with torch.no_grad(), torch.random.fork_rng():
            for p in twin.parameters():  # a last layer of zeros would hide everything
                p.copy_(torch.where(p == 0, torch.rand_like(p) / AWAY, p))
            found = []
            for rest in (values, others):
                torch.manual_seed(0)
                found.append(twin(own, ends, *rest))
            twin.eval()
            plain, padded = twin.net(**{name: given[name] for name in self.takes}), twin(*inputs)
        if not _close(*found) or not _close(plain, padded):
            raise CompileError(
                "the network's outputs depend on nodes that are padded (docs/usage.md#graphs): a batch-norm over nodes "
                "perhaps, or a mean over all of them, or random numbers in evaluation mode",
                "Normalise a node or a graph at a time (LayerNorm, or by the batch vector), and pool by the batch "
                "vector",
                module="",
            )


def _slots(owner: Tensor, sizes: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Which row of a list is where in ``(G, room)``, a graph's own again and again, and which are the first time."""
    place = torch.arange(room, device=owner.device)
    first = (sizes.cumsum(0) - sizes)[:, None] + place % sizes.clamp(min=1)[:, None]
    return owner.argsort(stable=True)[first.clamp(max=len(owner) - 1)], place < sizes[:, None]


def _other(value: Tensor, own: Tensor) -> Tensor:
    """Another value where there is padding; a word that the batch has, where it is one."""
    another = value + 1 if value.is_floating_point() else value.amax((0, 1), keepdim=True)
    return torch.where(own.reshape(own.shape + (1,) * (value.dim() - 2)), value, another)


def _close(a: Any, b: Any) -> bool:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-5, equal_nan=True) for x, y in pairs)
