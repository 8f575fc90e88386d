"""An evaluation tells how methods weigh experts for prompts unlike the training data, and the report shows it."""

import pytest

from coterie.data.examples import load_examples
from coterie.data.unlike import UNLIKE
from coterie.evaluation.unfamiliar import weights_for_unfamiliar

METHODS = ("base", "uniform-weights", "mole", "elrea", "membership-routing", "prefill", "elrea:top_k=1")


def test_methods_that_look_at_prompts_are_asked_about_one_prompt_of_each_kind(grid):
    cells = {name: grid.cell(name) for name in METHODS}
    found = weights_for_unfamiliar(cells)
    assert list(found) == ["elrea", "membership-routing", "prefill", "elrea:top_k=1"]
    prompts = list({row.source: row for row in load_examples(UNLIKE)}.values())
    wanted = cells["elrea"].route(prompts).normalized().weights.mean(dim=0).tolist()
    assert list(found["elrea"].values()) == pytest.approx(wanted, abs=1e-5)
    assert all(sum(weights.values()) == pytest.approx(1) for weights in found.values())


def test_where_nothing_looks_at_prompts_nothing_is_recorded(grid):
    assert weights_for_unfamiliar({"base": grid.cell("base")}) == {}
