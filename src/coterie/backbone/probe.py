"""A probe of a base model when it is loaded: does it give a batch what it gives each text alone?

Whatever the engine relies on is tried on three short texts, so that a model that breaks it is refused by name before
anything is spent on it: experts on every layer, rows of a cache side by side that change places, leave, join and fork.
"""

import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coterie.backbone.int8 import Int8Linear
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_layers, linear_shapes, unchangeable_layers
from coterie.backbone.model import Backbone, Reads
from coterie.backbone.slots import Slots
from coterie.data.batching import pad
from coterie.errors import CoterieError, first_line
from coterie.lora import Adapter, LoraPair

SHORT, LONG, EVEN = 0, 1, 2
LENGTHS = (2, 12, 12)  # of the prompts
EXPERTS = (0, 1, 0)  # that they run
ANSWER = 6  # tokens read behind a prompt
SENTENCE = "Two short texts (this one's words; quick, brown: zebras jump over 48 vixens) are read in unequal ways! Why?"

TRIES = 3  # with other texts and experts: where types are coarse, chance may turn a router's choice
ROUNDING = 4.0  # how far another way to compute a state may be off, in units of what rounding does to it
SMALLEST, LARGEST = 1e-3, 0.5  # what is always allowed, as a share of the state, and the most that ever is

WAYS = (Reads(), Reads(in_pieces=False), Reads(ragged=False), Reads(ragged=False, in_pieces=False))
"""In which a model may read, fast to slow; in the last one texts have nothing in common but the batch."""

BATCH = "what it computes for a text hangs on other texts of the batch, or on what stands behind it"
CACHE = "its past_key_values do not hold all that it needs to go on with a text"
ORDER = "what it has cached of texts goes wrong when they change places or leave"
FAILS = "it fails where a batch is read with experts and a cache"
FINITE = "its states are no finite numbers in this type of weights; it may work with --dtype float32 or bfloat16"
BLOCKS = "its blocks do not stand in one list, where gradients could be started"
LOGITS = "it changes its logits in an unknown way, so that experts could not be combined exactly"


class State(NamedTuple):
    """A last hidden state that a batch gave, and what is wrong with the model if the text alone has another one."""

    text: int
    position: int
    hidden: Float[Tensor, " width"]
    fault: str


@torch.inference_mode()
def checked(backbone: Backbone) -> Backbone:
    """Return a base model with the fastest way of reading in which it gives a batch what it gives each text alone.

    How far rounding moves a state is measured on the model itself: its depth, its type and its routers have a part in
    it. In two bytes a number, a small fault may pass for rounding.

    Raises:
        CoterieError: naming the model's architecture and what is wrong with it, if there is no such way.
    """
    fault = None
    for reads in WAYS:
        backbone = replace(backbone, reads=reads)
        if (fault := _fault(backbone)) is None:
            return backbone
        if fault not in (BATCH, CACHE, ORDER) and not fault.startswith(FAILS):
            break
    raise CoterieError(
        f"the base model {backbone.identity.id!r} ({backbone.model.config.model_type}) cannot be used: {fault}; "
        "use another one"
    )


def _fault(backbone: Backbone) -> str | None:
    try:
        # Mamba and RWKV keep their state elsewhere, and swallow a cache
        takes_cache = "past_key_values" in inspect.signature(backbone.decoder.forward).parameters
        fault = (None if takes_cache else CACHE) or _batch_fault(backbone) or _logits_fault(backbone)
        return fault or (None if backbone.blocks else BLOCKS)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever its code may raise where it is used in another way than by itself
        return f"{FAILS} ({first_line(error)})"


def _batch_fault(backbone: Backbone) -> str | None:
    """Return what the states of a batch show, if these are not the states of each text alone, whatever the texts."""
    faults = []
    for number in range(TRIES):
        texts = _texts(backbone, number)
        layers = ExpertLayers(backbone.model, [_random_adapter(backbone, 2 * number + own) for own in set(EXPERTS)])
        alone = [_read_alone(backbone, layers, texts, text) for text in (SHORT, LONG, EVEN)]
        if not all(bool(states.isfinite().all()) for states in alone):
            return FINITE
        with _rounded_anew(backbone.model):
            again = [_read_alone(backbone, layers, texts, text) for text in (SHORT, LONG, EVEN)]
        noise = max(float(_distances(one, other).max()) for one, other in zip(again, alone, strict=True))
        allowed = min(max(ROUNDING * noise, SMALLEST), LARGEST)
        states = _read_together(backbone, layers, texts)
        wrong = (s.fault for s in states if not _distances(s.hidden, alone[s.text][s.position]) <= allowed)
        if (fault := next(wrong, None)) is None:
            return None
        faults.append(fault)
    return faults[0]


def _logits_fault(backbone: Backbone) -> str | None:
    """Tell whether `Backbone.head` is what the model does after its last hidden state.

    In place of its products, the model's output layer gives evenly spaced numbers: a cap shows wherever it lies, and
    nothing but a few steps of rounding is allowed. Models may scale what the layer reads, too.
    """
    layer, ids = backbone.output_layer, torch.tensor([_texts(backbone, 0)[SHORT]], device=backbone.device)
    hidden = backbone.hidden(ids)
    ramp = torch.linspace(-300, 300, layer.out_features, device=hidden.device)
    off: list[float] = []

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        read = inputs[0].float()
        scale = (read * hidden).sum() / hidden.float().square().sum()
        off.append(float(_distances(read, scale * hidden).max()))
        return (scale * ramp).to(output.dtype).expand_as(output)

    handle = layer.register_forward_hook(replace)
    try:
        logits = backbone.model(input_ids=ids, use_cache=False).logits.float()
    finally:
        handle.remove()
    step = 8 * torch.finfo(hidden.dtype).eps
    expected = backbone.scaled(ramp).expand_as(logits)
    return None if max(off, default=1.0) <= step and torch.allclose(logits, expected, rtol=step, atol=step) else LOGITS


def _texts(backbone: Backbone, number: int) -> list[list[int]]:
    """Return texts, two of them of one length, in which no token comes twice."""
    known = backbone.tokenizer(SENTENCE, add_special_tokens=False).input_ids
    ids = iter(list(dict.fromkeys([*known, *range(backbone.embeddings)]))[number:])
    return [list(itertools.islice(ids, length + ANSWER)) for length in LENGTHS]


def _random_adapter(backbone: Backbone, seed: int) -> Adapter:
    """Return updates of rank 1 of the layers that experts can change, about a third as large as what layers give."""
    generator = torch.Generator().manual_seed(seed)
    shapes = linear_shapes(backbone.model)
    return {
        path: LoraPair(
            torch.randn(1, shapes[path][0], generator=generator) / shapes[path][0] ** 0.5,
            torch.randn(1, shapes[path][1], generator=generator) * 0.3,
        )
        for path in sorted({*shapes} - {*unchangeable_layers(backbone.model)})
        if backbone.model.get_submodule(path) is not backbone.output_layer
    }


def _running(layers: ExpertLayers, texts: Sequence[int]) -> AbstractContextManager[None]:
    """Let every row run the expert of its text."""
    return layers.running(layers.weighted(torch.eye(2)[[EXPERTS[text] for text in texts]]))


def _read_alone(
    backbone: Backbone, layers: ExpertLayers, texts: Sequence[Sequence[int]], text: int
) -> Float[Tensor, "position width"]:
    """Read a whole text without company or cache."""
    with _running(layers, [text]):
        return backbone.hidden(torch.tensor([texts[text]], device=backbone.device))[0]


def _read_together(backbone: Backbone, layers: ExpertLayers, texts: Sequence[Sequence[int]]) -> Iterator[State]:
    """Read the texts as the engine does: rows of a cache side by side, that change places, leave, join and fork."""
    slots, known = Slots(backbone), [0] * len(texts)
    rows = slots.claim(len(texts))

    def read(own: Sequence[int], counts: Sequence[int], fault: str) -> Iterator[State]:
        pieces = [texts[text][known[text] : known[text] + count] for text, count in zip(own, counts, strict=True)]
        ids = pad(pieces, backbone.pad_id, device=backbone.device).input_ids
        running = [rows[text] for text in own], ids, counts, lambda at: _running(layers, [own[place] for place in at])
        for text, count, hidden in zip(own, counts, slots.read(*running), strict=True):
            known[text] += count
            yield State(text, known[text] - 1, hidden[count - 1], fault)

    everyone = (SHORT, LONG, EVEN)
    yield from read(everyone, LENGTHS, BATCH)
    yield from read(everyone, (1, 1, 1), CACHE)
    yield from read(everyone, (1, 3, 2), CACHE)
    yield from read(everyone[::-1], (1, 1, 1), ORDER)
    slots.release([rows[SHORT]])
    (rows[SHORT],), known[SHORT] = slots.claim(1), 0
    yield from read([SHORT], LENGTHS[:1], ORDER)
    fork = slots.fork([rows[LONG]])
    slots.release([rows[LONG]])
    (rows[LONG],) = fork
    yield from read(everyone, (1, 1, 1), ORDER)


@contextmanager
def _rounded_anew(model: nn.Module) -> Iterator[None]:
    """Context manager: change what linear layers give as far as another order of adding up would.

    One number in twelve moves by one step of its type: rounding has the variance of 1/12 of a squared step.
    """
    generator = torch.Generator().manual_seed(0)

    def nudge(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:  # noqa: ANN401 - routers give tuples
        if not isinstance(output, Tensor):
            return None
        draws = torch.randint(0, 24, output.shape, generator=generator)
        steps = (draws == 0).int() - (draws == 1).int()
        rounded_to = torch.bfloat16 if isinstance(module, Int8Linear) else output.dtype
        return output * (1 + torch.finfo(rounded_to).eps * steps.to(output))

    handles = [module.register_forward_hook(nudge) for module in linear_layers(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _distances(one: Float[Tensor, "*places width"], other: Float[Tensor, "*places width"]) -> Float[Tensor, "*places"]:
    """Return how far states are from others, as shares of their length."""
    one, other = one.float(), other.float()
    return (one - other).norm(dim=-1) / other.norm(dim=-1)
