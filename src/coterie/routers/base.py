"""`Routing`, the one value that every router returns, and the contract of routers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from coterie.backbone.gates import Gates
from coterie.backbone.loading import Backbone
from coterie.data.batching import TokenRow
from coterie.errors import CoterieError
from coterie.experts.bank import ExpertBank
from coterie.features.growing_text import FeatureExtractor, GrowingFeatures, WholeTexts

Grain = Literal["prompt", "step", "layer"]
"""How often experts are weighed: once a prompt, again while the answer is written, or at every layer's input."""
GRAINS: tuple[Grain, ...] = get_args(Grain)  # from coarse to fine
SHARES = 1e-4  # weights whose sum is as near to 1 are shares of a whole
MOST_SHOWN = 5  # requests, and experts of each, that a routing prints


@dataclass(frozen=True, eq=False)
class Routing:
    """Weights over experts for some requests.

    Attributes:
        experts: names, in the order of the columns; every name stands once.
        weights: (request, expert): finite and >= 0, of every request at least one above 0; they need not sum to 1
            (ELREA's do not).
        similarities: what a router compared, by the same experts, where it compares anything.
        gates: where weights depend on the inputs of layers: what computes them there. `weights` is then what they gave
            on average over the tokens and layers of each prompt; even, as long as the prompt was not read.

    Raises:
        CoterieError: when shape or values break these rules.
    """

    experts: tuple[str, ...]
    weights: Tensor
    similarities: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Gates | None = None

    def __post_init__(self) -> None:
        """Check the rules above."""
        if self.weights.dim() != 2 or self.weights.shape[1] != len(self.experts):
            raise CoterieError(
                f"routing weights are (request, expert), so those of shape {tuple(self.weights.shape)} do not fit "
                f"{len(self.experts)} experts"
            )
        if len(set(self.experts)) != len(self.experts):
            raise CoterieError(f"every expert is routed once, but the routing names {', '.join(self.experts)}")
        if not bool(torch.isfinite(self.weights).all()) or bool((self.weights < 0).any()):
            raise CoterieError("routing weights must be finite and not negative; check the router's features")
        if idle := (~(self.weights > 0).any(dim=1)).nonzero().flatten().tolist():
            raise CoterieError(
                f"request {idle[0] + 1} is routed to nobody: all of its weights are 0; give an expert a weight above 0 "
                "(one that changes nothing stands for the base model alone)"
            )

    def __repr__(self) -> str:
        """Return the largest weights of the first requests."""
        count = len(self.weights)
        rows = [sorted(self.row(number).items(), key=lambda pair: -pair[1]) for number in range(min(count, MOST_SHOWN))]
        lines = [", ".join(f"{name} {weight:.3f}" for name, weight in row[:MOST_SHOWN]) for row in rows]
        more = [f"and {count - MOST_SHOWN} more"] if count > MOST_SHOWN else []
        return "\n  ".join([f"Routing(requests={count}, experts={len(self.experts)})", *lines, *more])

    def normalized(self) -> "Routing":
        """Scale weights to sum 1 over experts."""
        return replace(self, weights=self.weights / self.weights.sum(dim=-1, keepdim=True))

    def top(self, k: int) -> "Routing":
        """Keep the k largest weights of every row, zero the rest; ties keep the earlier expert.

        Shares still sum to 1, so that fewer experts do not act more weakly where they meet in the layers; weights with
        another sum are strengths, and stay as they are.

        Raises:
            CoterieError: when there are not k experts.
        """
        if not 1 <= k <= len(self.experts):
            raise CoterieError(
                f"--top-k-experts must be between 1 and {len(self.experts)} (the number of experts), got {k}"
            )
        if self.gates:
            raise CoterieError("--top-k-experts does not act on gates inside layers; leave it out for this router")
        order = self.weights.argsort(dim=-1, descending=True, stable=True)
        kept, total = self.weights.scatter(-1, order[:, k:], 0.0), self.weights.sum(dim=-1, keepdim=True)
        shares = kept / kept.sum(dim=-1, keepdim=True)
        return replace(self, weights=torch.where((total - 1).abs() < SHARES, shares, kept))

    def aligned(self, names: Sequence[str]) -> "Routing":
        """Return the same routing with the experts of a bank, in the bank's order; those that were not routed get 0.

        Raises:
            CoterieError: when a routed expert is not in the bank.
        """
        missing = set(self.experts) - set(names)
        if missing:
            raise CoterieError(f"the router knows experts that the bank does not hold: {', '.join(sorted(missing))}")
        weights = self.weights.new_zeros(len(self.weights), len(names))
        weights[:, [list(names).index(name) for name in self.experts]] = self.weights
        return replace(self, experts=tuple(names), weights=weights)

    def take(self, requests: Sequence[int]) -> "Routing":
        """Keep these requests, in this order; one that is named twice is there twice."""
        places = list(requests)
        similarities = {name: values[places] for name, values in self.similarities.items()}
        return replace(self, weights=self.weights[places], similarities=similarities)

    def row(self, request: int) -> dict[str, float]:
        """Return one request's weights by expert name."""
        return dict(zip(self.experts, self.weights[request].tolist(), strict=True))


@dataclass(frozen=True)
class RouterParts:
    """What saved routers are built from.

    Attributes:
        folder: where the router's tensors lie.
        run: the mixture's folder, where the checkpoints of gradients lie.
        backbone: the base model.
        bank: experts that gates may weigh.
        inner: for a router around another one: that one.
    """

    folder: Path
    run: Path
    backbone: Backbone
    bank: ExpertBank
    inner: "Router | None" = None


class Router(ABC):
    """Anything that turns prompts into weights, in two steps: what it reads off a prompt, and how that weighs experts.

    Attributes:
        kinds: what routers of this class are called in mixture.json.
        kind: this router's own among them.
        grain: how often it weighs; a combiner that cannot follow so often does not fit.
        every: tokens of an answer that share weights; None where the prompt's weights stay.
        cache: `keep` what earlier weights left in the KV cache, or `recompute` it.
        saved: its attributes that mixture.json keeps, and `__init__` takes, as they are.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    kind: str
    grain: Grain = "prompt"
    every: int | None = None
    cache: str = "keep"
    saved: ClassVar[tuple[str, ...]] = ()

    def route(self, prompts: Sequence[TokenRow]) -> Routing:
        """Weigh the experts for every prompt."""
        return self.weigh(self.read(prompts))

    def read(self, prompts: Sequence[TokenRow]) -> Any:
        """Read off prompts what `weigh` looks at: the costly part. By default that is the prompts themselves."""
        return list(prompts)

    @property
    def readings(self) -> Mapping[Hashable, Callable[[Sequence[TokenRow]], Any]]:
        """What `read` consists of, by what each part looks at: routers that look at the same can share it.

        One part alone is what `weigh` takes; of several it takes all, in this order.
        """
        return {id(self): self.read}

    @abstractmethod
    def weigh(self, read: Any) -> Routing:
        """Weigh the experts by what `read` gave."""

    def start(self, prompts: Sequence[TokenRow]) -> Routing:
        """Return the weights that decoding starts with: those of `route`, unless reading the prompt gives them."""
        return self.route(prompts)

    @property
    def growing(self) -> GrowingFeatures:
        """What is read off texts while they are written; by default each again as a whole."""
        return WholeTexts(self.read)

    @property
    def of_prompts(self) -> "Router":
        """The router that weighs prompts, without any re-routing around it."""
        return self

    def folded(self, dimensions: int) -> "Router":
        """Return the router that compares features in fewer dimensions.

        Raises:
            CoterieError: when it does not compare features, or they have no such dimensions.
        """
        raise CoterieError(f"only centroids can be compared in fewer dimensions, but router {self.kind!r} has none")

    @property
    def features(self) -> FeatureExtractor:
        """What turns prompts into the features that it looks at.

        Raises:
            CoterieError: when it looks at something else.
        """
        raise CoterieError(f"router {self.kind!r} looks at no features; fit the mixture again")

    def with_ddof(self, ddof: int) -> "Router":
        """Return the router that standardises by the deviation over `count - ddof`.

        Raises:
            CoterieError: when it does not standardise.
        """
        raise CoterieError(f"only standardised cosines have a deviation, but router {self.kind!r} has none")

    def with_caution(self, caution: float | None) -> "Router":
        """Return the router that refuses unfamiliar prompts by another caution, or never (None).

        Raises:
            CoterieError: when it has no caution to change.
        """
        if caution is None:
            return self
        raise CoterieError(f"router {self.kind!r} was never calibrated to refuse prompts, so it has no caution")

    def as_published(self, backbone: Backbone) -> "Router":
        """Return the router that weighs the same similarities as Belofsky 2023 published it.

        Raises:
            CoterieError: when it does not route by similarity.
        """
        raise CoterieError(f"the mixture routes by {self.kind!r}, so there are no similarities to weigh as published")

    def save(self, folder: Path) -> dict[str, Any]:
        """Write tensors into `folder` and return the entry for mixture.json.

        Raises:
            CoterieError: when it is of those that are never saved.
        """
        if not self.kinds:
            raise CoterieError(f"router {self.kind!r} lives in this process alone and is not saved; choose another one")
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.saved}}

    @classmethod
    def load(cls, record: Mapping[str, Any], parts: RouterParts) -> "Router":
        """Build a router from its entry and its tensors, as `save` wrote them.

        Raises:
            CoterieError: when a part is broken; `load_router` tells a KeyError, TypeError or ValueError as that too.
        """
        return cls(**{name: record[name] for name in cls.saved})


class Wrapper(Router):
    """A router around another one, which reads the prompts."""

    def __init__(self, router: Router) -> None:
        """Store the other one."""
        self.router = router

    def read(self, prompts: Sequence[TokenRow]) -> Any:
        """Read what the wrapped router reads."""
        return self.router.read(prompts)

    @property
    def readings(self) -> Mapping[Hashable, Callable[[Sequence[TokenRow]], Any]]:
        """Those of the wrapped router."""
        return self.router.readings

    def weigh(self, read: Any) -> Routing:
        """Weigh as the wrapped router does."""
        return self.router.weigh(read)

    @property
    def growing(self) -> GrowingFeatures:
        """What the wrapped router reads."""
        return self.router.growing

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the wrapped router's tensors and return the entry for mixture.json, with the wrapped one's in it."""
        return {**super().save(folder), "of": self.router.save(folder)}

    @classmethod
    def load(cls, record: Mapping[str, Any], parts: RouterParts) -> "Wrapper":
        """Build it from its entry, around the router that was built already."""
        if parts.inner is None:
            raise KeyError("of")
        return cls(parts.inner, **{name: record[name] for name in cls.saved})
