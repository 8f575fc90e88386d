"""Positions that run out: what is too long is told or dropped before anything runs, and generation stops in time."""

import logging

import pytest
import torch

import architectures
import tiny
from conftest import FIT, write_rows
from coterie import methods
from coterie.backbone.model import Backbone, BaseModelIdentity
from coterie.backbone.slots import Slots
from coterie.data.batching import PromptFormat, TokenRow, tokenise
from coterie.data.examples import load_examples
from coterie.errors import CoterieError
from coterie.evaluation.compare import compare
from coterie.mixture import Mixture
from coterie.settings.commands import EvaluationSettings

LIMIT = 96
RUNS_OUT = {"gpt2", "gpt_bigcode", "gpt_neo", "opt", "gptj", "codegen", "mpt"}


@pytest.mark.parametrize("name", architectures.WORKING)
def test_positions_run_out_where_the_model_says_so(name, monkeypatch):
    monkeypatch.setitem(architectures.SIZES, "max_position_embeddings", 24)
    if name == "mpt":
        monkeypatch.setitem(architectures.SIZES, "max_seq_len", 24)
    model = architectures.make_model(name)
    backbone = Backbone(model, tiny.make_tokenizer(), BaseModelIdentity("x", None, ""))
    assert (backbone.positions is not None) == (name in RUNS_OUT)
    text = torch.arange(40)[None]
    with torch.no_grad():
        if backbone.positions is None:
            backbone.hidden(text)
        else:
            backbone.hidden(text[:, : backbone.positions])
            with pytest.raises((IndexError, RuntimeError)):
                backbone.hidden(text[:, : backbone.positions + 1])


@pytest.fixture(scope="module")
def opt_run(tmp_path_factory):
    """A mixture on a tiny OPT that reads 96 tokens, fitted on rows of which three are longer."""
    folder = tmp_path_factory.mktemp("opt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.SIZES, "max_position_embeddings", LIMIT)
        architectures.save_model(folder / "model", "opt")
    rows = [row | {"response": row["response"] * (40 if n < 3 else 1)} for n, row in enumerate(tiny.make_rows(18))]
    data = write_rows(folder / "rows.jsonl", rows)
    logger, messages = logging.getLogger("coterie.data.batching"), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    settings = FIT | {"clusters": 2, "epochs": 1}
    methods.elrea(str(folder / "model"), str(data), output=folder / "run", device="cpu", **settings)
    logger.removeHandler(handler)
    return Mixture.from_pretrained(folder / "run", device="cpu"), messages


def test_rows_that_the_model_cannot_read_are_dropped_and_counted(opt_run):
    assert opt_run[1] == [f"dropped 3 of 18 examples longer than {LIMIT} tokens"]


@pytest.mark.parametrize("options", [{"combiner": "logits"}, {"combiner": "layers"}, {"combiner": "weights"}])
def test_an_answer_ends_with_length_where_positions_run_out(opt_run, options):
    mixture = opt_run[0].replace(**options)
    prompts = ["add 3 4", "a longer question than that"]
    found = mixture.generate(prompts, max_new_tokens=500, stop=[], temperature=1.0, seed=3)
    for prompt, answer in zip(prompts, found, strict=True):
        total = len(mixture.tokens([prompt])[0].ids) + len(answer.token_ids)
        if answer.finish_reason == "length":
            assert total == LIMIT + 1  # the last token is written and not read
        else:
            assert answer.token_ids[-1] in mixture.backbone.stop_ids
    assert any(answer.finish_reason == "length" for answer in found)


def test_padding_beside_a_text_at_its_end_has_positions_that_there_are(opt_run):
    """A text that reads its last token beside one that reads several."""
    backbone = opt_run[0].backbone
    slots = Slots(backbone)
    rows, ids = slots.claim(2), torch.arange(2 * LIMIT).view(2, -1)
    slots.read(rows, ids[:, : LIMIT - 1], [LIMIT - 1, 5])
    found = slots.read(rows, ids[:, LIMIT - 9 : LIMIT], [1, 9])
    wanted = backbone.hidden(torch.cat([ids[:1, : LIMIT - 1], ids[:1, LIMIT - 9 : LIMIT - 8]], dim=1))
    torch.testing.assert_close(found[0, 0], wanted[0, -1], rtol=1e-3, atol=1e-4)


def test_weights_that_follow_the_text_stop_there_too(opt_run):
    rerouted = opt_run[0].rerouted(3, combiner="layers", cache="recompute")
    answer = rerouted.generate(["add 3 4"], max_new_tokens=500)[0]
    assert answer.finish_reason == "length"
    assert len(rerouted.tokens(["add 3 4"])[0].ids) + len(answer.token_ids) == LIMIT + 1


@pytest.mark.parametrize("ask", [Mixture.generate, Mixture.route])
def test_a_prompt_that_is_too_long_is_told_by_number_before_anything_runs(opt_run, ask, monkeypatch):
    monkeypatch.setattr(Backbone, "hidden", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(CoterieError, match="prompt 2 has 1.. tokens, but the base model reads 96; shorten it"):
        ask(opt_run[0], ["short", "x" * 90])


def test_an_answer_up_to_the_last_position_is_scored_where_weights_follow_the_text(opt_run):
    prompts = opt_run[0].tokens(["add 3 4"])
    answer = (65,) * (LIMIT + 1 - len(prompts[0].ids))
    fixed = opt_run[0].replace(router="base", combiner="layers").rerouted(100)
    scored = fixed.score_teacher_forced(prompts, [answer])[0]
    assert len(scored.logprobs) == len(answer)


def test_a_text_to_continue_that_is_too_long_is_told(opt_run):
    row = TokenRow((65,) * 97, 97, (False,) * 97, (True,) * 97)
    with pytest.raises(CoterieError, match="row 1 has 97 tokens, but the base model reads 96"):
        opt_run[0].complete([row])


def test_a_test_row_that_is_too_long_is_told_before_anything_is_trained(opt_run, monkeypatch):
    monkeypatch.setattr(Backbone, "hidden", lambda *_, **__: pytest.fail("the model ran"))
    rows = load_examples(
        [{"id": "r1", "instruction": "x", "response": "y"}, {"instruction": "x", "response": "y" * 90}]
    )
    settings = EvaluationSettings(mixture="x", data=["x"], output="x", methods="elrea,gate")
    with pytest.raises(CoterieError, match="test row 1 has 1.. tokens, but the base model reads 96; shorten it"):
        compare(opt_run[0], rows, settings)


def test_rows_that_all_are_too_long_are_told_with_the_models_limit():
    prompts = PromptFormat(tiny.make_tokenizer())
    with pytest.raises(CoterieError, match="all 3 examples are longer than 8 tokens .*the base model reads no more"):
        tokenise(prompts, load_examples(tiny.make_rows(3)), 500, positions=8)
