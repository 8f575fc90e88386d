"""Memory: what is told before anything is loaded is what is taken, to the byte, and an engine keeps to its budget."""

import gc

import pytest
import torch
from torch import nn

import architectures
from coterie.backbone.linear_layers import linear_shapes, unchangeable_layers
from coterie.backbone.memory import held_bytes
from coterie.backbone.row_mix import RequestRows
from coterie.backbone.slots import Slots
from coterie.errors import CoterieError
from coterie.experts.bank import write_adapter
from coterie.lora import LoraPair
from coterie.mixture import Mixture
from coterie.mixture.local_answers import LocalExpert, load_local
from coterie.mixture.memory import needed_bytes
from coterie.mixture.prompts import as_examples
from coterie.records.adapter import AdapterConfig
from coterie.settings.groups import PlacementSettings, SamplingSettings

EXPERTS = torch.eye(3)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """For a model: its folder, and three experts, of unequal ranks and layers, and none."""

    def make(name: str) -> tuple[str, dict[str, LocalExpert]]:
        folder = tmp_path_factory.mktemp(name)
        model = architectures.make_model(name)
        shapes, stay = linear_shapes(model), unchangeable_layers(model)
        paths = [path for path in shapes if path not in stay and "lm_head" not in path][:5]
        for rank, own in ((2, paths[:3]), (4, paths[1:])):
            pairs = {path: LoraPair(*(torch.ones(rank, width) for width in shapes[path])) for path in own}
            config = AdapterConfig(r=rank, lora_alpha=rank, target_modules=own)
            write_adapter(folder / f"{rank}", config.model_dump(), pairs)
        found = {f"{rank}": LocalExpert(folder / f"{rank}") for rank in (2, 4)}
        return str(architectures.save_model(folder / "model", name)), {**found, "plain": LocalExpert()}

    return make


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "auto") for name in ("llama", "gemma3_text", "qwen2_moe", "deepseek_v3", "lfm2", "gpt2")]
    + [("llama", "bfloat16")],
)
def test_memory_is_told_from_files_as_it_is_taken(experts, name, dtype):
    """Weights, updates as they were read and as they are stacked, and what is cached of three rows of 70 tokens."""
    (folder, own), here = experts(name), PlacementSettings(device="cpu", dtype=dtype)
    counted = needed_bytes(folder, own, here, 3, 70)
    answerer = load_local(folder, own, here, 3)
    assert len(answerer.bank) == 3
    slots, mix = Slots(answerer.backbone), answerer.layers.mix([RequestRows(EXPERTS, torch.ones(3))])
    with answerer.layers.running(mix):
        held = held_bytes(answerer) - held_bytes(mix)
    with answerer.layers.running(mix):
        slots.read(slots.claim(3), torch.zeros(3, 70, dtype=torch.long))
    assert counted == held + slots.bytes


def test_memory_of_a_model_that_is_not_here_is_not_known():
    assert needed_bytes("some/model-at-the-hub", {"a": LocalExpert()}, PlacementSettings(device="cpu"), 1, 8) is None


# ---------------------------------------------------------------------------------------------- while it is answered


def storages(*kinds: type) -> int:
    """The bytes of all tensors of these kinds that the program holds, wherever they are."""
    held = {}
    for found in gc.get_objects():
        if type(found) in kinds:
            storage = found.untyped_storage()
            held[storage._cdata] = storage.nbytes()
    return sum(held.values())


def test_all_that_a_mixture_takes_is_counted_and_nothing_twice(run_folder):
    """Against a walk over every object of the program: base model, experts, stacks, the router's features and plans."""
    gc.collect()
    before = storages(torch.Tensor, nn.Parameter)
    mixture = Mixture.from_pretrained(run_folder, device="cpu")
    mixture.generate(["add 1 2"], max_new_tokens=2)
    engine = mixture.engine()
    list(engine.run(mixture.requests(mixture.tokens(as_examples("add 1 2")), [3], [SamplingSettings()])))
    gc.collect()
    taken = storages(torch.Tensor, nn.Parameter) - before
    assert held_bytes(mixture, engine) == pytest.approx(taken, rel=1e-3)
    parameters = sum(weight.nbytes for weight in mixture.backbone.model.parameters())
    assert held_bytes(mixture) > parameters + 2 * sum(
        pair.down.nbytes + pair.up.nbytes for adapter in mixture.bank.adapters for pair in adapter.values()
    )


def test_an_engine_keeps_to_its_budget_with_all_that_it_holds(run_folder):
    mixture = Mixture.from_pretrained(run_folder, device="cpu")
    rows = mixture.tokens(as_examples(["add 1 2", "SPELL AB NOW"]))
    requests = mixture.requests(rows, [3, 3], [SamplingSettings()])
    mixture.layers.load()
    held, cache = held_bytes(mixture), Slots(mixture.backbone)
    with pytest.raises(CoterieError, match=r"its experts and routers takes [\d,]+ bytes, and all may take [\d,]+;"):
        mixture.engine(budget=held)
    most = max(len(row.ids) for row in rows) + 3
    per_request = len(mixture.bank)
    budget = held + cache.bytes_for(per_request, most)
    engine = mixture.engine(budget=budget)
    assert engine.submit(requests[0]) != engine.submit(requests[1])
    found = []
    while not engine.is_idle:
        found += engine.step()
        assert engine.load.running <= 1
        assert held_bytes(mixture, engine) <= budget + 20_000, "what rows run, and what is sampled, is beside"
    assert {token.request for token in found} == {0, 1}
    small = mixture.engine(budget=budget - 1)
    with pytest.raises(CoterieError, match=r"takes [\d,]+ bytes, more than the [\d,]+ less [\d,]+ of weights that it"):
        small.submit(requests[0])
