"""Steps of a fixed shape: the same passes again and again, recorded once and then asked of a GPU at once.

A step reads one token, or one and its proposals, of rows in the first slots of the cache. Numbers of rows and columns
are rounded up, and all that changes from step to step stands in tensors at fixed addresses: the rows' lengths and
tokens, and what they run. So few shapes come, whoever joins or leaves, and what was recorded of one stays right.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coterie.backbone.layers import ExpertLayers
from coterie.backbone.model import Backbone
from coterie.backbone.row_mix import RowMix, chosen_at_most, padded
from coterie.backbone.slots import COLUMNS, Slots
from coterie.backbone.span import StepSpan
from coterie.data.devices import on_device

SIZES = (1, 2, 3, 4, 6, 9, 13)
"""Tokens of each row that steps read: one, and as many more as are proposed at once."""
KEPT = 48
"""Steps that are kept; those that were not taken for longest go first."""

Pass = Callable[[], Tensor]
"""One forward pass, from tensors that stay where they are."""
Record = Callable[[Pass], Pass | None]
"""Returns what gives the same as a pass, whenever it is called; None where it cannot."""


class CudaGraphs:
    """Records passes as CUDA graphs, which share one pool of memory."""

    def __init__(self) -> None:
        """Begin without any."""
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Pass) -> Pass:
        """Record what a pass asks of the GPU, of which other threads may go on asking for what they like."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            states = run()

        def replay() -> Tensor:
            graph.replay()
            return states

        return replay


def checked(record: Record) -> Record:
    """Let a record count where it gives what the pass has given; it gives None where not, or where recording fails."""

    def check(run: Pass) -> Pass | None:
        wanted = run().clone()
        try:
            recorded = record(run)
            found = None if recorded is None else recorded()
        except RuntimeError:  # of the device, or of a model whose code asks what only the host can answer
            return None
        close = found is not None and torch.allclose(found, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().mean()))
        return recorded if close else None

    return check


class Shape(NamedTuple):
    """What decides of which operations a step consists.

    Attributes:
        rows: in the first slots; some may be none.
        size: tokens of each.
        columns: that they look at.
        chosen: experts that each row runs; 0 for all of the stack.
        gates: the identities of those that weigh rows.
    """

    rows: int
    size: int
    columns: int
    chosen: int
    gates: tuple[int, ...]


class Steps:
    """Reads the next tokens of rows in steps of a fixed shape."""

    def __init__(self, backbone: Backbone, layers: ExpertLayers, slots: Slots, record: Record) -> None:
        """Begin without any step.

        Args:
            backbone: a model that `allows` them.
            layers: the bank's experts.
            slots: the cache.
            record: keeps a step for the next times.
        """
        self._backbone, self._layers, self._slots, self._record = backbone, layers, slots, record
        self._steps: OrderedDict[Shape, _Step] = OrderedDict()
        self._generation = (-1, -1)
        self.pay = True
        """Whether steps can be recorded, as far as is known."""

    @staticmethod
    def allows(backbone: Backbone, slots: Slots) -> bool:
        """Tell whether a model reads rows of unequal length, several tokens at once, and keeps nothing of padding."""
        return backbone.reads.ragged and backbone.reads.in_pieces and slots.can_rollback

    def take(self, positions: int) -> bool:
        """Tell whether so many tokens a row are read in a step; all of a text may be, behind a pass that broke off."""
        return self.pay and positions <= SIZES[-1]

    @torch.inference_mode()
    def read(
        self, rows: Sequence[int], tokens: Int[Tensor, "row position"], counts: Sequence[int], mix: RowMix
    ) -> Float[Tensor, "row position width"]:
        """Feed rows their next tokens, as `Slots.read`.

        Args:
            rows: handles, each once.
            tokens: on the host; at most as many a row as the largest of `SIZES`.
            counts: how many of them are the rows' own.
            mix: what the rows run.
        """
        lengths = self._slots.take_first(rows, counts)
        step = self._step(len(rows), tokens.shape[1], max(map(sum, zip(lengths, counts, strict=True))), mix)
        state = torch.full(step.state.shape, -1)
        state[: len(rows), 0] = torch.tensor(lengths)
        for own, piece, count in zip(state, tokens, counts, strict=False):
            own[1 : 1 + count] = piece[:count]
        step.take(state, mix)
        with self._layers.running(step.mix):
            states = self._run(step)
        self._slots.advance(rows, counts)
        return states[: len(rows), : tokens.shape[1]].clone()

    def _step(self, rows: int, positions: int, length: int, mix: RowMix) -> "_Step":
        """Return the step for so many rows with texts of up to this length; all are new where buffers are others."""
        cache = self._slots.cache
        if self._generation != (self._layers.generation, cache.generation):
            self._steps.clear()
            self._generation = (self._layers.generation, cache.generation)
        step = max(1, 2 ** (rows - 1).bit_length() // 4)  # 1, 2, 3, 4, 6, 8, 12, 16, 24, ...
        shape = Shape(
            min(-(-rows // step) * step, cache.slots),
            next(size for size in SIZES if size >= positions),
            min(cache.columns, max(COLUMNS, 1 << (length - 1).bit_length())),
            chosen_at_most(mix, self._layers.stacked_experts),
            tuple(id(own.gates) for own in mix.gated),
        )
        if shape not in self._steps:
            self._steps[shape] = _Step(self._backbone, self._slots, self._layers.stacked_experts, shape, mix)
        self._steps.move_to_end(shape)
        if len(self._steps) > KEPT:
            self._steps.popitem(last=False)
        return self._steps[shape]

    def _run(self, step: "_Step") -> Tensor:
        """Run a step: as it is the first time, which warms it up, and recorded from the second time on."""
        if step.recorded is None and step.is_warm and self.pay:
            step.recorded = self._record(step.run)
            self.pay = step.recorded is not None
        step.is_warm = True
        return step.recorded() if step.recorded is not None else step.run()


class _Step:
    """A pass of one shape, with the tensors that it reads."""

    def __init__(self, backbone: Backbone, slots: Slots, experts: int, shape: Shape, mix: RowMix) -> None:
        self._backbone, self._cache, self._shape, self._experts = backbone, slots.cache, shape, experts
        self.state = torch.zeros(shape.rows, 1 + shape.size, dtype=torch.long, device=backbone.device)
        self._taken, self.mix = mix, padded(mix, shape.rows, experts, shape.chosen)
        self.is_warm = False
        self.recorded: Pass | None = None

    def take(self, state: Int[Tensor, "row numbers"], mix: RowMix) -> None:
        """Take in rows' lengths, their tokens, -1 where there is none, and what they run if that is new."""
        self.state.copy_(on_device(state, self.state.device))
        if mix is not self._taken:
            own = padded(mix, self._shape.rows, self._experts, self._shape.chosen)
            for held, new in zip(self.mix.tensors, own.tensors, strict=True):
                held.copy_(new)
            self._taken = mix

    def run(self) -> Float[Tensor, "row position width"]:
        """Run the model on them."""
        span = StepSpan(self.state, self._shape.columns)
        self._cache.begin(span)
        positions = self._backbone.within(span.positions)
        return self._backbone.hidden(span.tokens, self._cache.masks(), positions, self._cache)
