"""The arithmetic of LoRA on plain tensors.

Letters in shapes: E experts, R rank, I inputs and O outputs of a linear layer, N rows, T positions. An update is
`up.T @ down` here: `down` is PEFT's A (R, I); `up` is the transpose of PEFT's B (O, R) with the scaling alpha / r
already in it, so that no caller can forget it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coterie.data.devices import on_device
from coterie.errors import CoterieError, unknown_name


class LoraPair(NamedTuple):
    """One layer's update: `x -> (x @ down.T) @ up`.

    `up` holds the scaling already; `scaling` tells it again for the merges that PEFT defines on the bare factors.
    """

    down: Float[Tensor, "rank in"]
    up: Float[Tensor, "rank out"]
    scaling: float = 1.0

    @property
    def bare_up(self) -> Float[Tensor, "rank out"]:
        """Return PEFT's B, transposed: `up` without its scaling.

        On the CPU, scaling it again gives `up` bit for bit where `up` was a scaled B, and else to its last bit.
        """
        return self.up / self.scaling if self.scaling else self.up

    def to(self, device: torch.device | None) -> "LoraPair":
        """Return the same update on a device."""
        return self._replace(down=on_device(self.down, device), up=on_device(self.up, device))

    def __repr__(self) -> str:
        """Return the shapes."""
        return f"LoraPair(down {tuple(self.down.shape)}, up {tuple(self.up.shape)}, scaling {self.scaling:g})"


Adapter = Mapping[str, LoraPair]
"""Module path in the base model -> that layer's update. A layer that is absent is not changed."""


class StackedPair(NamedTuple):
    """The updates of E experts for one layer, padded with zeros to one rank: padding adds exact zeros."""

    down: Float[Tensor, "expert rank in"]
    up: Float[Tensor, "expert rank out"]

    def part(self, first: int, end: int) -> "StackedPair":
        """Return these experts, without `end`: views, no copies."""
        return self if (first, end) == (0, len(self.down)) else StackedPair(self.down[first:end], self.up[first:end])


def stack(pairs: Sequence[LoraPair | None]) -> StackedPair:
    """Stack one layer's updates over experts; an expert without one (None) gets zeros.

    Shapes: E pairs (R_e, I), (R_e, O) -> (E, max R, I), (E, max R, O).

    Raises:
        ValueError: when no expert changes the layer.
    """
    present = [pair for pair in pairs if pair is not None]
    if not present:
        raise ValueError("no expert changes this layer")
    rank = max(pair.down.shape[0] for pair in present)
    like = present[0]
    down = like.down.new_zeros(len(pairs), rank, like.down.shape[1])
    up = like.up.new_zeros(len(pairs), rank, like.up.shape[1])
    for expert, pair in enumerate(pairs):
        if pair is not None:
            down[expert, : pair.down.shape[0]] = pair.down
            up[expert, : pair.up.shape[0]] = pair.up
    return StackedPair(down, up)


@torch.inference_mode(False)  # or what was put there in inference mode could not be written over outside of it
def put(stacked: StackedPair, number: int, pair: LoraPair | None) -> StackedPair:
    """Return the stack with this update as that expert's, in place or, where it does not fit, in a larger copy."""
    experts, rank, _ = stacked.down.shape
    down, up = (half.new_zeros(0, half.shape[2]) for half in stacked) if pair is None else pair[:2]
    own = contained(StackedPair(down[None].to(stacked.down.dtype), up[None].to(stacked.up.dtype)))
    if number >= experts or len(down) > rank:
        size = (max(experts, number + 1), max(rank, len(down)))
        larger = StackedPair(*(half.new_zeros(*size, half.shape[2]) for half in stacked))
        for half, old in zip(larger, stacked, strict=True):
            half[:experts, :rank] = old
        stacked = larger
    for half, (new,) in zip(stacked, own, strict=True):
        half[number] = 0
        half[number, : len(new)] = on_device(new, half.device)
    return stacked


def contained(stacked: StackedPair) -> StackedPair:
    """Let experts with numbers that are not finite give NaN by `down` alone.

    From there it comes as ranks of their own, which are left out where they weigh 0. In `up` it would reach every row
    of a product, whatever it weighs there.
    """
    broken = ~(stacked.down.isfinite().flatten(1).all(dim=1) & stacked.up.isfinite().flatten(1).all(dim=1))
    if broken.device.type == "cpu" and not bool(broken.any()):  # elsewhere, to ask is to wait
        return stacked
    fillings = zip(stacked, (torch.nan, 0.0), strict=True)
    return StackedPair(*(half.masked_fill(broken[:, None, None], filling) for half, filling in fillings))


# ------------------------------------------------------------------------------------ updates added to what layers give


def add_in_order(
    out: Float[Tensor, "row position out"], x: Float[Tensor, "row position in"], pair: StackedPair
) -> Float[Tensor, "row position out"]:
    """Add each row's own expert, where rows are ordered by expert, equally many of each: two batched products."""
    groups = (len(pair.down), -1)
    ranks = torch.bmm(x.reshape(*groups, x.shape[-1]), pair.down.mT)
    return _add_product(out.reshape(*groups, out.shape[-1]), ranks, pair.up).reshape(out.shape)


def add_padded(
    out: Float[Tensor, "row position out"],
    x: Float[Tensor, "row position in"],
    pair: StackedPair,
    order: Int[Tensor, " place"],
    back: Int[Tensor, " row"],
) -> Float[Tensor, "row position out"]:
    """Add each row's own expert, where rows have any order.

    Args:
        out: what the updates are added to.
        x: the layer's input.
        pair: the experts.
        order: the rows of each expert in turn, equally many: where an expert has fewer, any row stands in.
        back: where each row stands there.
    """
    grouped = x[order].reshape(len(pair.down), -1, x.shape[-1])
    update = torch.bmm(torch.bmm(grouped, pair.down.mT), pair.up)
    return out + update.reshape(len(order), *out.shape[1:])[back].to(out.dtype)


def add_by_row(
    out: Float[Tensor, "row position out"],
    x: Float[Tensor, "row position in"],
    pair: StackedPair,
    experts: Int[Tensor, "row chosen"],
    shares: Float[Tensor, "row chosen"] | None = None,
    unused: Bool[Tensor, "row chosen"] | None = None,
) -> Float[Tensor, "row position out"]:
    """Add the mixture of each row's own experts, whose factors are copied for it.

    Args:
        out: what the updates are added to.
        x: the layer's input.
        pair: the experts.
        experts: of each row.
        shares: their weights; without, each weighs 1.
        unused: where these are 0, if they are anywhere.
    """
    down, up = (half[experts].flatten(1, 2) for half in pair)  # [N, K R, I], [N, K R, O]
    ranks = torch.bmm(x, down.mT)
    if shares is not None:
        own = None if unused is None else unused[:, None]
        by_expert = ranks.unflatten(-1, (-1, pair.down.shape[1]))
        ranks = _weighed(by_expert, shares[:, None], own).flatten(-2)
    return _add_product(out, ranks, up)


def add_weighted(
    out: Float[Tensor, "row position out"],
    x: Float[Tensor, "row position in"],
    pair: StackedPair,
    weights: Float[Tensor, "row #position expert"],  # noqa: F821
    unused: Bool[Tensor, "row #position expert"] | None = None,  # noqa: F821
) -> Float[Tensor, "row position out"]:
    """Add the exact mixture sum_e w_e up_e.T down_e, with weights of its own for every row (and position).

    All `down` stand in one product, the weights act in rank space, all `up` stand in one product: the cost grows
    with the sum of ranks, and no tensor of size rows x experts x outputs exists. Where weights are `unused`, ranks that
    are not finite touch nobody.
    """
    experts, rank, width = pair.down.shape
    ranks = (x @ pair.down.reshape(-1, width).T).unflatten(-1, (experts, rank))  # [N, T, E, R]
    ranks = _weighed(ranks, weights, unused).reshape(-1, experts * rank)
    return _add_product(out.reshape(-1, out.shape[-1]), ranks, pair.up.flatten(0, 1)).reshape(out.shape)


def _weighed(
    ranks: Float[Tensor, "row position expert rank"],
    weights: Float[Tensor, "row #position expert"],  # noqa: F821
    unused: Bool[Tensor, "row #position expert"] | None,  # noqa: F821
) -> Float[Tensor, "row position expert rank"]:
    """Weigh the ranks of experts; of those that are not used, 0 times infinity is 0 as well."""
    ranks = ranks * weights.unsqueeze(-1).to(ranks.dtype)
    return ranks if unused is None else ranks.masked_fill(unused.unsqueeze(-1), 0)


def add_chosen(
    out: Float[Tensor, "row position out"],
    x: Float[Tensor, "row position in"],
    pair: StackedPair,
    weights: Float[Tensor, "row position expert"],
) -> Float[Tensor, "row position out"]:
    """Add the same mixture, computing at every token only the experts whose weight there is not 0.

    Tokens are grouped by expert, once for each of their experts: the cost grows with the chosen ranks, not with all.
    How many tokens each has must be known before its products, so this waits for the device.
    """
    tokens, shares = x.flatten(0, 1), weights.flatten(0, 1).to(x.dtype)
    expert, token = shares.T.nonzero(as_tuple=True)  # ordered by expert
    counts = expert.bincount(minlength=shares.shape[1]).tolist()
    grouped = zip((tokens[token] * shares[token, expert, None]).split(counts), *pair, strict=True)
    updates = torch.cat([own @ down.T @ up for own, down, up in grouped if len(own)])
    return out.flatten(0, 1).index_add(0, token, updates.to(out.dtype)).reshape(out.shape)


def _add_product(
    out: Float[Tensor, "*group token out"],
    ranks: Float[Tensor, "*group token rank"],
    up: Float[Tensor, "*group rank out"],
) -> Float[Tensor, "*group token out"]:
    """Return out + ranks @ up: in `out` itself, where no gradient is wanted."""
    if out.dtype != up.dtype:
        return out + (ranks @ up).to(out.dtype)
    if torch.is_grad_enabled():
        return torch.baddbmm(out, ranks, up) if out.dim() == 3 else torch.addmm(out, ranks, up)
    return out.baddbmm_(ranks, up) if out.dim() == 3 else out.addmm_(ranks, up)


COPIED = 32  # tokens whose products with a factor cost as much as copying it, measured on CPU


def copying_pays(rows: int, positions: int, chosen: int, experts: int) -> bool:
    """Tell whether copying each row's chosen experts (`add_by_row`) costs less than computing all (`add_weighted`)."""
    return rows * chosen * (COPIED + positions) < experts * (COPIED + rows * positions)


GROUPED_RANKS, GROUPED_TOKENS = 256, 64  # from which on grouping tokens pays, measured on CPU


def grouping_pays(tokens: int, chosen: int, experts: int, rank: int) -> bool:
    """Tell whether grouping tokens by expert (`add_chosen`) costs less than computing all (`add_weighted`)."""
    return experts * rank >= GROUPED_RANKS and tokens >= GROUPED_TOKENS and 3 * chosen <= experts


# ---------------------------------------------------------------------------------------------- one pair out of many

MERGES = ("exact", "factors", "peft-linear", "peft-0.4-linear")
"""Ways to merge, `svd` apart, which may name a rank. Only `exact` is the weighted sum of the updates."""


def merge(pairs: Sequence[LoraPair], weights: Float[Tensor, " expert"], how: str = "exact") -> LoraPair:
    """Return one pair in place of many: exactly their weighted sum, or one of the approximations in use.

    Args:
        pairs: updates of one layer.
        weights: one per update.
        how: `exact`, `factors`, `peft-linear`, `peft-0.4-linear`, `svd` (to the largest rank of the pairs) or `svd:R`.

    Raises:
        CoterieError: for another name, or unequal ranks where a way adds the factors themselves.
    """
    name, _, rank = how.partition(":")
    check_merge(how)
    if name == "svd":
        return truncated(merge(pairs, weights), int(rank) if rank else max(len(pair.down) for pair in pairs))
    weights = on_device(weights, pairs[0].up.device, pairs[0].up.dtype)
    if name == "exact":  # all ranks, one after the other
        ups = [pair.up * weight for pair, weight in zip(pairs, weights, strict=True)]
        return LoraPair(torch.cat([pair.down for pair in pairs]), torch.cat(ups))
    if len({len(pair.down) for pair in pairs}) > 1:
        ranks = ", ".join(str(len(pair.down)) for pair in pairs)
        raise CoterieError(f"merging by {name!r} adds factors, so it needs one rank, got {ranks}; use exact or svd")
    # The factors themselves are added up, each with weights of its own; unlike the updates' sum, that has cross terms.
    scalings = on_device([pair.scaling for pair in pairs], weights.device, weights.dtype)
    match name:
        case "factors":  # (sum w B)(sum w A), ELREA's "MoE Merging": a single expert already gets its weight squared
            of_down, of_up = weights, weights
        case "peft-linear":  # sqrt(|w s|) for both bare factors and the sign for A, as PEFT's `linear` since 0.9
            roots = (weights * scalings).abs().sqrt()
            of_down, of_up = roots * (weights * scalings).sign(), roots / scalings
        case _:  # (sum B)(sum w s A), as PEFT's `linear` from 0.4 to 0.6: B goes in without its weight
            of_down, of_up = weights * scalings, 1 / scalings
    down = torch.stack([pair.down for pair in pairs])
    up = torch.stack([pair.up for pair in pairs])
    return LoraPair(torch.einsum("e,eri->ri", of_down, down), torch.einsum("e,ero->ro", of_up, up))


def check_merge(how: str) -> None:
    """Refuse a way of merging that does not exist.

    Raises:
        CoterieError: naming those that do.
    """
    name, colon, rank = how.partition(":")
    if name not in (*MERGES, "svd"):
        raise unknown_name("way to merge", how, [*MERGES, "svd", "svd:R"])
    if colon and not (name == "svd" and rank.isdigit() and int(rank) >= 1):
        raise CoterieError(
            f"only svd takes a rank, a whole number from 1 upwards, got {how!r}; type for example svd:16"
        )


def truncated(pair: LoraPair, rank: int) -> LoraPair:
    """Return the nearest pair of at most this rank (Eckart and Young 1936)."""
    u, values, vh = svd(pair)
    roots = values[:rank].sqrt()
    up, down = (u[:, :rank] * roots).T, roots[:, None] * vh[:rank]
    return LoraPair(down.to(pair.down).contiguous(), up.to(pair.up).contiguous())


def svd(pair: LoraPair) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
    """Return U, the singular values and V^T of an update, in float64, without forming the dense update.

    The update is up.T @ down; with up.T = Q1 R1 and down.T = Q2 R2 its singular values are those of R1 @ R2.T.
    """
    left, left_core = torch.linalg.qr(pair.up.T.double())
    right, right_core = torch.linalg.qr(pair.down.T.double())
    u, values, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left @ u, values, vh @ right.T


def squared_norm(pair: LoraPair) -> float:
    """Return the squared Frobenius norm of an update from its factors: the sum of (up up.T) * (down down.T)."""
    up, down = pair.up.double(), pair.down.double()
    return float(((up @ up.T) * (down @ down.T)).sum())


def squared_distance(one: LoraPair, other: LoraPair) -> float:
    """Return the squared Frobenius norm of the difference of two updates of one layer."""
    difference = LoraPair(torch.cat([one.down, other.down]), torch.cat([one.up, -other.up]))
    return max(0.0, squared_norm(difference))
