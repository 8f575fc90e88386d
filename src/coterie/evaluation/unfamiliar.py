"""How methods weigh experts for prompts that are unlike the training data: whether they know what they do not know."""

from collections.abc import Mapping

from coterie.data.examples import load_examples
from coterie.data.unlike import UNLIKE
from coterie.evaluation.shared_scores import SharedRouting
from coterie.mixture import Mixture
from coterie.routers.base import Router, Wrapper
from coterie.routers.feature import FeatureRouter


def weights_for_unfamiliar(cells: Mapping[str, Mixture]) -> dict[str, dict[str, float]]:
    """Return the mean weights of every method that looks at prompts, over one prompt of each kind that comes along."""
    looking = {name: cell.router for name, cell in cells.items() if _looks_at_prompts(cell.router)}
    if not looking:
        return {}
    one_of_each = {example.source: example for example in load_examples(UNLIKE)}
    shared = SharedRouting(next(iter(cells.values())).tokens(list(one_of_each.values())))
    found = {name: shared(router).routing.normalized() for name, router in looking.items()}
    return {
        name: dict(zip(routing.experts, routing.weights.mean(dim=0).tolist(), strict=True))
        for name, routing in found.items()
    }


def _looks_at_prompts(router: Router) -> bool:
    while isinstance(router, Wrapper):
        router = router.router
    return isinstance(router, FeatureRouter)
