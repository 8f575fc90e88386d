"""Every architecture of the table: what a mixture computes is what PEFT computes without padding or company."""

import copy
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import DynamicCache

import architectures
from architectures import ARCHITECTURES, REFUSED, WORKING
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone, load_backbone
from coterie.combiners.table import make_combiner
from coterie.engine.decoding import combined_logits
from coterie.engine.rows import CachedRows
from coterie.errors import CoterieError
from coterie.experts.bank import load_adapter
from coterie.experts.fresh_adapter import lora_config
from coterie.routers.base import Routing
from coterie.settings.groups import LoraSettings, ModelSettings

NAMES = ("one", "other")
PROMPTS = [[72, 65], [80, 76, 69, 65, 83, 69, 32, 82, 69, 65, 68], [84, 69, 76, 76, 77, 69]]
ANSWERS = [[66, 67, 68, 69], [70, 71, 72, 73], [74, 75, 76, 77]]
FIRST = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.6, 0.4]])
LATER = torch.tensor([[0.9, 0.1], [0.0, 1.0], [0.5, 0.5]])


class Place(NamedTuple):
    """A base model as it is loaded, its experts, and PEFT's own model with both of them."""

    backbone: Backbone
    layers: ExpertLayers
    peft: PeftModel

    def rows(self, combiner: str, weights: Tensor) -> CachedRows:
        return CachedRows(self.backbone, self.layers, make_combiner(combiner), Routing(NAMES, weights))

    def logits(self, rows: CachedRows, tokens: list[list[int]]) -> Tensor:
        """What a mixture gives behind the last token of every request."""
        return combined_logits(self.backbone, rows.read(tokens)[:, -1], rows.plan.votes)

    @torch.no_grad()
    def mixed(self, weights: Tensor) -> str:
        """The name of PEFT's own weighted sum of the updates, which is exact: ranks stand side by side."""
        name = "mix-" + "-".join(f"{weight:.2f}".replace(".", "_") for weight in weights.tolist())
        if name not in self.peft.peft_config:
            self.peft.add_weighted_adapter(list(NAMES), weights.tolist(), name, combination_type="cat")
        return name

    @torch.no_grad()
    def alone(self, ids: list[int], adapter: str) -> Tensor:
        """What PEFT gives behind the last token of one text, without a cache."""
        self.peft.set_adapter(adapter)
        return self.peft(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()


@pytest.fixture(scope="module")
def place(request, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp(request.param)
    backbone = load_backbone(
        ModelSettings(model=str(architectures.save_model(folder / "base", request.param)), device="cpu")
    )
    peft = random_experts(backbone, folder)
    return Place(
        backbone, ExpertLayers(backbone.model, [load_adapter(folder / n, backbone.model) for n in NAMES]), peft
    )


def random_experts(backbone: Backbone, folder: Path) -> PeftModel:
    """Two adapters of every layer that a fit would change, written by PEFT itself."""
    torch.manual_seed(0)
    config = lora_config(backbone, LoraSettings(rank=2, dropout=0.0))
    peft = get_peft_model(copy.deepcopy(backbone.model), config, adapter_name=NAMES[0])
    peft.add_adapter(NAMES[1], config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    return peft.eval()


def close(found: Tensor, wanted: Tensor) -> None:
    """Equal up to what another order of the same sums makes of float32 in a few layers."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def weighed(place: Place, weights: Tensor, text: list[int]) -> Tensor:
    """What PEFT's models give, each alone and without a cache, summed."""
    pairs = zip(NAMES, weights.tolist(), strict=True)
    return sum(weight * place.alone(text, name) for name, weight in pairs if weight)


def merged(place: Place, weights: Tensor, text: list[int]) -> Tensor:
    """What PEFT's merged adapter gives, without a cache."""
    return place.alone(text, place.mixed(weights))


in_every_architecture = pytest.mark.parametrize("place", WORKING, indirect=True)


@in_every_architecture
@pytest.mark.parametrize(
    ("combiner", "alone"),
    [("logits", weighed), ("layers", merged), ("weights", merged)],
    ids=["logits", "layers", "weights"],
)
def test_requests_that_join_leave_and_are_read_anew_get_what_peft_gives_them_alone(place, combiner, alone):
    rows, texts = place.rows(combiner, FIRST), [[], [], []]

    def check(requests: list[int], tokens: list[list[int]], weights: Tensor) -> None:
        for request in requests:
            texts[request] = texts[request] + tokens[request]
        wanted = [alone(place, weights[request], texts[request]) for request in requests]
        close(place.logits(rows, [tokens[request] for request in requests]), torch.stack(wanted))

    first, second, third, _ = zip(*([[token] for token in answer] for answer in ANSWERS), strict=True)
    check([0, 1, 2], PROMPTS, FIRST)
    check([0, 1, 2], first, FIRST)
    rows.keep([0, 2])
    check([0, 2], second, FIRST)
    rows.change(Routing(NAMES, LATER[[0, 2]]), recompute=True)
    whole, texts = texts, [[], [], []]
    check([0, 2], whole, LATER)
    rows.keep([1])
    check([2], third, LATER)


@in_every_architecture
@pytest.mark.parametrize("combiner", ["layers", "weights"])
def test_weights_that_change_over_a_kept_cache_give_what_they_give_one_text(place, combiner):
    rows = place.rows(combiner, FIRST)
    rows.read(PROMPTS)
    rows.change(Routing(NAMES, LATER))  # rows of merged adapters change places here
    tokens = [answer[:1] for answer in ANSWERS]
    found, wanted = place.logits(rows, tokens), []
    for prompt, token, before, after in zip(PROMPTS, tokens, FIRST, LATER, strict=True):
        cache, places = DynamicCache(config=place.backbone.model.config), torch.arange(len(prompt) + 1)[None]
        for ids, positions, weights in ((prompt, places[:, :-1], before), (token, places[:, -1:], after)):
            place.peft.set_adapter(place.mixed(weights))
            ids = torch.tensor([ids])
            with torch.no_grad():
                logits = place.peft(ids, position_ids=positions, past_key_values=cache, use_cache=True).logits
        wanted.append(logits[0, -1].float())
    close(found, torch.stack(wanted))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_right_is_refused_by_name_when_it_is_loaded(name, tmp_path):
    folder = architectures.save_model(tmp_path, name)
    with pytest.raises(CoterieError, match=ARCHITECTURES[name].refusal) as refused:
        load_backbone(ModelSettings(model=str(folder), device="cpu"))
    assert name in str(refused.value)
    assert str(folder) in str(refused.value)


def test_the_page_on_inputs_tells_what_becomes_of_every_architecture_of_the_table():
    page = (Path(__file__).parents[1] / "docs" / "inputs.md").read_text().partition("## Base models\n")[2]
    tables = re.findall(r"^\|.*(?:\n\|.*)+", page.partition("\n## ")[0], re.MULTILINE)
    working, refused = (re.findall(r"`([\w-]+)`", table) for table in tables)
    assert sorted(working) == sorted(WORKING)
    assert sorted(set(refused) - {"past_key_values"}) == sorted(REFUSED)
