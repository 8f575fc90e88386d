"""The routers by kind, as they stand in mixture.json."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from coterie.errors import CoterieError, unknown_name
from coterie.routers.base import Router, RouterParts
from coterie.routers.centroid import CentroidRouter
from coterie.routers.derived import DerivedRouter
from coterie.routers.distilled import DistilledRouter
from coterie.routers.fixed import FixedRouter, SourceRouter
from coterie.routers.gate import GateRouter
from coterie.routers.logo import LogoRouter
from coterie.routers.loss import LossRouter
from coterie.routers.membership import MembershipRouter
from coterie.routers.refusal import RefusalRouter
from coterie.routers.score_table import ScoreTableRouter
from coterie.routers.token import TokenLevel

ROUTERS: dict[str, type[Router]] = {
    kind: router
    for router in (
        FixedRouter,
        CentroidRouter,
        MembershipRouter,
        LossRouter,
        ScoreTableRouter,
        TokenLevel,
        GateRouter,
        LogoRouter,
        SourceRouter,
        DerivedRouter,
        DistilledRouter,
        RefusalRouter,
    )
    for kind in router.kinds
}
"""Every kind of router, and the class that saves and loads it."""


def load_router(record: Mapping[str, Any], parts: RouterParts) -> Router:
    """Build a router from its entry in `mixture.json`.

    Raises:
        CoterieError: for an unknown kind, or missing or broken parts.
    """
    kind = str(record.get("kind"))
    if kind not in ROUTERS:
        raise unknown_name("router", kind, ROUTERS)
    inner = load_router(record["of"], parts) if "of" in record else None
    try:
        return ROUTERS[kind].load(record, replace(parts, inner=inner))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CoterieError(
            f"{parts.folder}: the entry of the router {kind!r} is broken ({error}); fit again"
        ) from error
