"""Knowing when to say no: a wrapper that gives a prompt to one expert alone where the mixture is not borne out.

A mixture answers a prompt that is familiar (`familiarity.py`). Where that does not tell unlike rows, since the training
data are of nearly every kind, its weights have also to have gained over that expert on the training rows which are
nearest to it, by copies that were not trained on them. How familiar a prompt has to be is calibrated on rows like the
training data, and on what the mixture harmed of unlike ones.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coterie.artifacts import read_floats, write_tensors
from coterie.data.batching import TokenRow
from coterie.errors import CoterieError
from coterie.features.growing_text import FeatureExtractor, GrowingFeatures, WholeTexts
from coterie.routers.base import Router, RouterParts, Routing, Wrapper
from coterie.routers.derived import DerivedRouter
from coterie.routers.familiarity import Familiarity, Nearest
from coterie.routers.feature import load_extractor
from coterie.routers.loss import CrossFitLosses

CAUTION = 0.1
"""The share of rows like the training data that a mixture leaves as unfamiliar."""
HARM = 1e-3
"""Nats by which a row counts as harmed: less is rounding."""
LOSSES = ("nll", "pairs", "tokens")
SUPPORT = 1.0
"""Standard errors by which a prompt's weights have to gain on the nearest rows: less is told from none by nobody."""
WIDE = 0.25
"""The share of unlike rows up to which familiarity tells them: where more look familiar, it is no protection alone."""
ROUNDING = 1e-9


def support(
    losses: CrossFitLosses, fallback: str, weights: Float[Tensor, "prompt expert"], nearest: Nearest
) -> Float[Tensor, " prompt"]:
    """Return how surely each prompt's own weights gain over an expert on the rows that are nearest to the prompt.

    Args:
        losses: of the experts on the rows, by copies that were not trained on them.
        fallback: the expert.
        weights: in the order of the losses' experts; they sum to 1.
        nearest: of the rows.

    Returns:
        The mean gain, in nats over a row's tokens, in its standard errors; these count as `HARM` where they are less.
    """
    rows, near = losses.take(nearest.rows.flatten()), nearest.rows.shape[1]
    found = nearest.found.double()
    gain = rows.gain(weights.repeat_interleave(near, dim=0), fallback).double().view_as(found)
    count = found.sum(dim=1)
    mean = (found * gain).sum(dim=1) / count.clamp(min=1)
    squares = (found * (gain - mean[:, None]).square()).sum(dim=1)
    error = (squares / (count * (count - 1)).clamp(min=1)).sqrt()
    return (mean / error.clamp(min=HARM)).float()


class Limits(NamedTuple):
    """What a prompt has to have for the mixture to answer: at least this familiarity, and more than this support."""

    familiarity: float
    support: float

    def met(self, familiarity: Float[Tensor, " row"], support: Float[Tensor, " row"] | None) -> Bool[Tensor, " row"]:
        """Tell which prompts have it; None where nobody's support is looked at."""
        familiar = familiarity >= self.familiarity
        return familiar if support is None else familiar & (support > self.support)


class Observed(NamedTuple):
    """Rows whose references the mixture was scored on.

    Attributes:
        familiarity: of every row.
        gain: the expert's loss minus the mixture's, in nats, summed over the row's tokens.
        support: of every row; None where nobody's is looked at, as in mixtures of before.
    """

    familiarity: Float[Tensor, " row"]
    gain: Float[Tensor, " row"]
    support: Float[Tensor, " row"] | None = None

    def answered(self, limits: Limits) -> Bool[Tensor, " row"]:
        """Tell which rows the mixture answers."""
        return limits.met(self.familiarity, self.support)


class Calibration(NamedTuple):
    """What a refusal is calibrated on: rows like the training data, and unlike ones (there may be none)."""

    inside: Observed
    outside: Observed

    def limits(self, caution: float) -> Limits:
        """Return what a prompt has to have, by how familiar the rows are.

        The least familiarity leaves the share `caution` of the rows inside unfamiliar. It is lowered to the middle
        between that and the most familiar of the outside rows that the mixture harms, supported or not, where all of
        these lie below; where it harms none of them, everything is answered that is as familiar as anything that was
        seen. What it helps outside counts for nothing: the sample is small, and refusing is cheap. Where nothing is
        gained inside, nothing is answered (inf).

        Support is asked, by more than `SUPPORT`, unless outside rows are harmed and familiarity alone tells them: no
        more than the share `WIDE` of all outside rows is as familiar as the rows inside that are not left.
        """
        familiarity, outside = self.inside.familiarity.sort().values, self.outside
        left = int(caution * len(familiarity) + ROUNDING)
        if float(self.inside.gain.double().sum()) <= 0 or left >= len(familiarity):
            return Limits(torch.inf, SUPPORT)
        least, asked = float(familiarity[left]), SUPPORT
        if len(outside.gain):
            harmed = outside.familiarity[outside.gain < -HARM]
            if len(harmed):
                told = float((outside.familiarity >= least).float().mean()) <= WIDE
                asked = -torch.inf if told else SUPPORT
                least = (least + min(float(harmed.max()), least)) / 2
            else:
                least = float(torch.cat([familiarity, outside.familiarity]).min())
        return Limits(least, asked)


class RefusalRouter(Wrapper):
    """Routes as another router does where that is borne out, and gives a prompt to one expert alone where it is not."""

    kind = "refusal"
    kinds = (kind,)
    saved = ("fallback", "caution")

    def __init__(
        self,
        router: Router,
        familiarity: Familiarity,
        calibration: Calibration,
        fallback: str,
        caution: float = CAUTION,
        extractor: FeatureExtractor | None = None,
        losses: CrossFitLosses | None = None,
    ) -> None:
        """Wrap a router of prompts.

        Args:
            router: weighs the experts for familiar prompts.
            familiarity: the training rows.
            calibration: what the limits are chosen by.
            fallback: the expert that gets all of an unfamiliar prompt.
            caution: the share of rows like the training data that is left as unfamiliar.
            extractor: of the features that are compared; None for those that the router reads itself.
            losses: of the experts on the rows that are compared; None in mixtures of before, which ask no support.

        Raises:
            CoterieError: for a router that weighs experts in the layers, a caution that is no share, or losses of
                other rows.
        """
        if router.grain == "layer":
            raise CoterieError(
                f"router {router.kind!r} weighs experts inside the layers, where no prompt as a whole can be refused; "
                "take a router of prompts"
            )
        if not 0 <= caution <= 1:
            raise CoterieError(
                f"caution is the share of rows that is left to the fallback, from 0 to 1; got {caution:g}"
            )
        if losses and len(losses.nll) != len(familiarity.rows):
            raise CoterieError(f"losses of {len(losses.nll)} rows do not fit {len(familiarity.rows)} familiar ones")
        super().__init__(router)
        self.grain, self.every, self.cache = router.grain, router.every, router.cache
        self.familiarity = familiarity
        self.calibration = calibration
        self.fallback = fallback
        self.caution = caution
        self.extractor = extractor
        self.losses = losses
        self.limits = calibration.limits(caution)

    @property
    def refused(self) -> dict[str, float]:
        """The shares of the rows that it was calibrated on which it refuses: `inside`, and `outside`."""
        seen = self.calibration._asdict().items()
        return {side: 1 - float(own.answered(self.limits).float().mean()) for side, own in seen}

    def read(self, prompts: Sequence[TokenRow]) -> Any:
        """Read what the wrapped router reads, and features where these are others."""
        read = self.router.read(prompts)
        return read if self.extractor is None else (read, self.extractor(prompts))

    @property
    def readings(self) -> Mapping[Hashable, Callable[[Sequence[TokenRow]], Any]]:
        """What the wrapped router reads, and features where these are others."""
        if self.extractor is None:
            return self.router.readings
        return {**self.router.readings, self.extractor.key: self.extractor}

    @property
    def growing(self) -> GrowingFeatures:
        """What the wrapped router reads, where that is compared too."""
        return self.router.growing if self.extractor is None else WholeTexts(self.read)

    def weigh(self, read: Any) -> Routing:
        """Weigh as the wrapped router does, scaled to sum 1, or give everything to the fallback."""
        read, features = (read, read) if self.extractor is None else read
        routing = self.router.weigh(read).normalized()
        names, weights = routing.experts, routing.weights
        if self.fallback not in names:
            names, weights = (*names, self.fallback), torch.nn.functional.pad(weights, (0, 1))
        alone = torch.zeros(len(names))
        alone[names.index(self.fallback)] = 1.0
        familiarity, nearest = self.familiarity.compare(features)
        borne_out = None
        if self.losses:
            aligned = Routing(names, weights).aligned(self.losses.experts).weights
            borne_out = support(self.losses, self.fallback, aligned, nearest)
        answered = self.limits.met(familiarity, borne_out)
        return Routing(names, torch.where(answered[:, None], weights, alone), routing.similarities)

    def with_caution(self, caution: float | None) -> Router:
        """Return the router with another caution, or the wrapped one, scaled as here, which never refuses (None).

        Raises:
            CoterieError: when it is no share.
        """
        if caution is None:
            return DerivedRouter(self.router, normalised=True)
        known = self.familiarity, self.calibration, self.fallback
        return RefusalRouter(self.router, *known, caution, self.extractor, self.losses)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the rows, their losses, the calibration and the wrapped router; return the entry for mixture.json."""
        tensors = self.familiarity.tensors()
        for side, own in self.calibration._asdict().items():
            if len(own.gain):
                tensors[side] = torch.stack([own.familiarity, own.gain])
                if own.support is not None:
                    tensors[f"{side}_support"] = own.support
        how: dict[str, Any] = {"description": self.extractor.name, **self.extractor.record} if self.extractor else {}
        if self.losses:
            how["experts"] = list(self.losses.experts)
            tensors |= {name: getattr(self.losses, name) for name in LOSSES}
        write_tensors(folder / "refusal.safetensors", tensors)
        return {**super().save(folder), **how}

    @classmethod
    def load(cls, record: Mapping[str, Any], parts: RouterParts) -> "RefusalRouter":
        """Build it from its entry and its tensors, around the router that was built already."""
        if parts.inner is None:
            raise KeyError("of")
        names = tuple(record.get("experts", ()))
        seen = {"inside": (2, None), "outside": (2, None), "inside_support": (None,), "outside_support": (None,)}
        rows = {"rows": (None, None), "spread": (None,), "centre": (None,), "strangers": (None, None)}
        own = dict(zip(LOSSES, ((None, len(names)), (None, len(names), len(names)), (None,)), strict=True))
        optional = ["spread", "centre", "strangers", "outside", "inside_support", "outside_support"]
        wanted = {**rows, **seen, **(own if names else {})}
        tensors = read_floats(parts.folder / "refusal.safetensors", wanted, "fit again", optional=optional)
        extractor = load_extractor(record, parts) if "description" in record else None

        def observed(side: str) -> Observed:
            found, borne_out = tensors.get(side, torch.zeros(2, 0)), tensors.get(f"{side}_support")
            if borne_out is not None and len(borne_out) != found.shape[1]:
                raise ValueError(f"the support of {len(borne_out)} rows does not fit {found.shape[1]}")
            return Observed(found[0], found[1], borne_out)

        calibration = Calibration(observed("inside"), observed("outside"))
        fallback, caution = str(record["fallback"]), float(record["caution"])
        familiarity = Familiarity.read(tensors)
        width = familiarity.rows.shape[1]
        if extractor and (not width or extractor.dimensions % width):
            raise ValueError(f"rows of {width} dimensions cannot be compared with features of {extractor.dimensions}")
        if names and (fallback not in names or len({len(tensors[name]) for name in ("rows", *LOSSES)}) > 1):
            raise ValueError(f"losses of {', '.join(names)} do not fit {fallback!r} and the rows")
        losses = CrossFitLosses(names, *(tensors[name] for name in LOSSES)) if names else None
        return cls(parts.inner, familiarity, calibration, fallback, caution, extractor, losses)
