"""Every architecture of the table: what a mixture computes is what PEFT computes without padding or company."""

import copy
import re
from collections.abc import Sequence
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
from coterie.data.batching import TokenRow
from coterie.engine.engine import Engine
from coterie.engine.request import Request, Rerouting, Token
from coterie.errors import CoterieError
from coterie.experts.bank import load_adapter
from coterie.experts.fresh_adapter import lora_config
from coterie.features.growing_text import WholeTexts
from coterie.routers.base import Routing
from coterie.settings.groups import LoraSettings, ModelSettings

NAMES = ("one", "other")
PROMPTS = [[72, 65], [80, 76, 69, 65, 83, 69, 32, 82, 69, 65, 68], [84, 69, 76, 76, 77, 69]]
FIRST = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.6, 0.4]])
LATER = torch.tensor([[0.9, 0.1], [0.0, 1.0], [0.5, 0.5]])


class Place(NamedTuple):
    """A base model as it is loaded, its experts, and PEFT's own model with both of them."""

    backbone: Backbone
    layers: ExpertLayers
    peft: PeftModel

    def answers(self, combiner: str, routings: Sequence[Routing | Rerouting]) -> list[list[Token]]:
        """Every prompt's answer, of 2, 4 and 3 tokens: one request joins later, and prompts are read in pieces."""
        engine = Engine(self.backbone, self.layers, places=2, chunk=8)
        rows = [TokenRow(tuple(ids), len(ids), (False,) * len(ids), (True,) * len(ids)) for ids in PROMPTS]
        parts = zip(rows, routings, (2, 4, 3), strict=True)
        found: list[list[Token]] = [[], [], []]
        for token in engine.run(Request(row, own, make_combiner(combiner), limit) for row, own, limit in parts):
            assert isinstance(token, Token), token
            found[token.request].append(token)
        return found

    @torch.no_grad()
    def mixed(self, weights: Tensor) -> str:
        """The name of PEFT's own weighted sum of the updates, which is exact: ranks stand side by side."""
        name = "mix-" + "-".join(f"{weight:.2f}".replace(".", "_") for weight in weights.tolist())
        if name not in self.peft.peft_config:
            self.peft.add_weighted_adapter(list(NAMES), weights.tolist(), name, combination_type="cat")
        return name

    @torch.no_grad()
    def alone(self, ids: list[int], adapter: str) -> Tensor:
        """What PEFT gives behind every token of one text, without a cache."""
        self.peft.set_adapter(adapter)
        return self.peft(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


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


def check(token: Token, wanted: Tensor) -> None:
    """A token is the likeliest there is, or as good as it, and has the probability that these logits give it."""
    assert float(wanted.max() - wanted[token.id]) <= 1e-4 * float(wanted.abs().max())
    close(torch.tensor(token.logprob), wanted.log_softmax(dim=0)[token.id])


in_every_architecture = pytest.mark.parametrize("place", WORKING, indirect=True)


@in_every_architecture
@pytest.mark.parametrize(
    ("combiner", "alone"),
    [("logits", weighed), ("layers", merged), ("weights", merged)],
    ids=["logits", "layers", "weights"],
)
def test_requests_that_join_and_leave_get_what_peft_gives_them_alone(place, combiner, alone):
    answers = place.answers(combiner, [Routing(NAMES, weights[None]) for weights in FIRST])
    for prompt, weights, tokens in zip(PROMPTS, FIRST, answers, strict=True):
        told = alone(place, weights, [*prompt, *(token.id for token in tokens[:-1])])
        for token, wanted in zip(tokens, told[len(prompt) - 1 :], strict=True):
            check(token, wanted)


def renewing(*, recompute: bool) -> Rerouting:
    """The prompts' first weights for their first token, and the later ones from then on."""

    def weigh(rows: Sequence[TokenRow]) -> Routing:
        numbers = [next(n for n, ids in enumerate(PROMPTS) if row.ids[0] == ids[0]) for row in rows]
        is_grown = [len(row.ids) > len(PROMPTS[number]) for number, row in zip(numbers, rows, strict=True)]
        pairs = zip(numbers, is_grown, strict=True)
        return Routing(NAMES, torch.stack([LATER[number] if grown else FIRST[number] for number, grown in pairs]))

    return Rerouting(WholeTexts(list), weigh, NAMES, 1, recompute)


@in_every_architecture
def test_texts_that_are_read_anew_under_other_weights_are_as_if_they_had_those_from_the_start(place):
    answers = place.answers("layers", [renewing(recompute=True)] * 3)
    for number, tokens in enumerate(answers):
        text = [*PROMPTS[number], *(token.id for token in tokens[:-1])]
        first, later = (merged(place, weights[number], text)[len(PROMPTS[number]) - 1 :] for weights in (FIRST, LATER))
        for token, wanted in zip(tokens, [first[0], *later[1:]], strict=True):
            check(token, wanted)


@in_every_architecture
@pytest.mark.parametrize("combiner", ["layers", "weights"])
def test_weights_that_change_over_a_kept_cache_give_what_they_give_one_text(place, combiner):
    answers = place.answers(combiner, [renewing(recompute=False)] * 3)
    for prompt, before, after, tokens in zip(PROMPTS, FIRST, LATER, answers, strict=True):
        cache, ids, start = DynamicCache(config=place.backbone.model.config), prompt, 0
        for token, weights in zip(tokens, [before, *[after] * 3], strict=False):
            place.peft.set_adapter(place.mixed(weights))
            positions = torch.arange(start, start + len(ids))[None]
            with torch.no_grad():
                logits = place.peft(
                    torch.tensor([ids]), position_ids=positions, past_key_values=cache, use_cache=True
                ).logits
            check(token, logits[0, -1].float())
            ids, start = [token.id], start + len(ids)


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
