"""A probe of a base model when it is loaded: does it give a batch what it gives each text alone?

Whatever the engine relies on is tried on two short texts, so that a model that breaks it is refused by name before
anything is spent on it: experts on every layer, padding, a cache, rows that change places and leave.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coterie.backbone.cache import make_cache, select_rows
from coterie.backbone.layers import ExpertLayers, linear_layers, linear_shapes, unchangeable_layers
from coterie.backbone.model import Backbone
from coterie.data.batching import pad
from coterie.errors import CoterieError, first_line
from coterie.lora import Adapter, LoraPair

SHORT, LONG = 0, 1
LENGTHS = (2, 12)  # of the prompts: what stands right behind padding shows best whether that leaks
ANSWER = 3  # tokens read one by one
SENTENCE = "Two short texts (this one's words; quick, brown: zebras jump over 48 vixens) are read in unequal ways! Why?"

TRIES = 3  # with other texts and experts: where types are coarse, chance may turn a router's choice
ROUNDING = 4.0  # how far another way to compute a state may be off, in units of what rounding does to it
SMALLEST, LARGEST = 1e-3, 0.5  # what is always allowed, as a share of the state, and the most that ever is

BATCH = "what it computes for a text hangs on other texts of the batch, or on what stands behind it"
CACHE = "its past_key_values do not hold all that it needs to go on with a text"
PADDING = "padding changes what it computes for a text"
ORDER = "what it has cached of texts goes wrong when they change places or leave"
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
def check_model(backbone: Backbone) -> None:
    """Refuse a base model that does not give a batch what it gives each text alone.

    How far rounding moves a state is measured on the model itself: its depth, its type and its routers have a part in
    it. In two bytes a number, a small fault may pass for rounding.

    Raises:
        CoterieError: naming the model's architecture and what is wrong with it.
    """
    try:
        fault = _cache_fault(backbone) or _batch_fault(backbone) or _logits_fault(backbone)
        fault = fault or (None if backbone.blocks else BLOCKS)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever its code may raise where it is used in another way than by itself
        fault = f"it fails where a batch is read with experts and a cache ({first_line(error)})"
    if fault:
        raise CoterieError(
            f"the base model {backbone.identity.id!r} ({backbone.model.config.model_type}) cannot be used: {fault}; "
            "use another one"
        )


def _cache_fault(backbone: Backbone) -> str | None:
    """Look for the cache among what the model takes: Mamba and RWKV keep their state elsewhere, and swallow a cache."""
    return None if "past_key_values" in inspect.signature(backbone.decoder.forward).parameters else CACHE


def _batch_fault(backbone: Backbone) -> str | None:
    """Return what the states of a batch show, if these are not the states of each text alone, whatever the texts."""
    faults = []
    for number in range(TRIES):
        texts = _texts(backbone, number)
        layers = ExpertLayers(backbone.model, [_random_adapter(backbone, 2 * number + text) for text in (SHORT, LONG)])
        alone = [_read_alone(backbone, layers, texts, text) for text in (SHORT, LONG)]
        if not all(bool(states.isfinite().all()) for states in alone):
            return FINITE
        with _rounded_anew(backbone.model):
            again = [_read_alone(backbone, layers, texts, text) for text in (SHORT, LONG)]
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
    """Return two texts of unequal length, in which no token comes twice."""
    known = backbone.tokenizer(SENTENCE, add_special_tokens=False).input_ids
    ids = list(dict.fromkeys([*known, *range(backbone.embeddings)]))[number:]
    short, long = (length + ANSWER for length in LENGTHS)
    return [ids[:short], ids[short : short + long]]


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


def _read_alone(
    backbone: Backbone, layers: ExpertLayers, texts: Sequence[Sequence[int]], text: int
) -> Float[Tensor, "position width"]:
    """Read a whole text without company, padding or cache."""
    with layers.running(layers.weighted(torch.eye(2)[[text]])):
        return backbone.hidden(torch.tensor([texts[text]], device=backbone.device))[0]


def _read_together(backbone: Backbone, layers: ExpertLayers, texts: Sequence[Sequence[int]]) -> Iterator[State]:
    """Read both texts as the engine does: the prompts padded on the left, then token by token from a cache.

    Before the second token the rows change places, before the third the long text leaves. At every step the text
    without padding comes first, so that the first state that is wrong tells the cause.
    """
    cache, device = make_cache(backbone.model.config), backbone.device
    mask = torch.zeros(2, 0, dtype=torch.long, device=device)
    rows, known = [SHORT, LONG], [0, 0]
    one = (1,) * len(LENGTHS)
    steps = [(rows, LENGTHS, (PADDING, BATCH)), (rows, one, (PADDING, CACHE))]
    steps += [(rows[::-1], one, (ORDER, ORDER)), ([SHORT], one, (ORDER, ORDER))]
    for staying, counts, faults in steps:
        if staying != rows:
            places = [rows.index(text) for text in staying]
            select_rows(cache, places, device)
            mask, rows = mask[places], staying
        pieces = [texts[text][known[text] : known[text] + counts[text]] for text in rows]
        ids, own, _ = pad(pieces, backbone.pad_id, side="left", device=device)
        positions = mask.sum(dim=1, keepdim=True) + (own.cumsum(dim=1) - 1).clamp(min=0)
        mask = torch.cat([mask, own], dim=1)
        with layers.running(layers.weighted(torch.eye(2)[rows])):
            hidden = backbone.hidden(ids, mask, positions, cache)[:, -1]
        for text in sorted(rows, reverse=True):
            known[text] += counts[text]
            yield State(text, known[text] - 1, hidden[rows.index(text)], faults[text])


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
        return output * (1 + torch.finfo(output.dtype).eps * steps.to(output))

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
