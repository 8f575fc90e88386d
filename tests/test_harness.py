"""lm-evaluation-harness runs a mixture offline, and its numbers are those of the mixture itself."""

import copy
import dataclasses
import math

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

import tiny
from chat_templates import GEMMA
from conftest import write_rows
from coterie.backbone.loading import load_backbone
from coterie.data.batching import TokenRow
from coterie.errors import CoterieError
from coterie.evaluation.harness import HarnessModel
from coterie.settings.groups import ModelSettings

PAIRS = [("add 3 4 gives", " 7"), ("the word", " is A B"), ("x", "y"), ("add 11 25", " 36 and no more")]


def request(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.fixture(scope="module")
def model(mixture):
    return HarnessModel(mixture, batch_size=3)


def naive(mixture, before: list[int], after: list[int]) -> tuple[float, bool]:
    """Token by token, without batches: one request at a time through the mixture's own scoring."""
    row = TokenRow(
        (*before, *after),
        len(before),
        (False,) * len(before) + (True,) * len(after),
        (True,) * (len(before) + len(after)),
    )
    routing = mixture.router.route([row.prompt()])
    total = -float(mixture.score_rows([row], routing, "x").nll[0, 0]) * len(after)
    greedy = mixture.complete([row.prompt()], max_new_tokens=len(after))[0].token_ids
    return total, list(greedy) == after


def tokens(mixture, text: str) -> list[int]:
    return mixture.backbone.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_log_likelihoods_are_those_of_one_request_at_a_time(mixture, model):
    found = model.loglikelihood([request("loglikelihood", *pair) for pair in PAIRS])
    for (context, continuation), (total, is_greedy) in zip(PAIRS, found, strict=True):
        expected = naive(mixture, tokens(mixture, context), tokens(mixture, continuation))
        assert total == pytest.approx(expected[0], abs=1e-3)
        assert is_greedy == expected[1]


def test_weights_that_follow_the_text_do_so_in_the_harness(mixture):
    renewed = mixture.rerouted(2, combiner="layers")
    found = HarnessModel(renewed, batch_size=3).loglikelihood([request("loglikelihood", *pair) for pair in PAIRS])
    fixed = HarnessModel(mixture.replace(combiner="layers")).loglikelihood(
        [request("loglikelihood", *pair) for pair in PAIRS]
    )
    for (context, continuation), (total, is_greedy) in zip(PAIRS, found, strict=True):
        expected = naive(renewed, tokens(mixture, context), tokens(mixture, continuation))
        assert total == pytest.approx(expected[0], abs=1e-3)
        assert is_greedy == expected[1]
    assert found[3][0] != pytest.approx(fixed[3][0], abs=1e-4)


def test_what_the_mixture_would_write_is_the_greedy_continuation(mixture, model):
    ids = tokens(mixture, "SPELL ABCD")
    row = TokenRow(tuple(ids), len(ids), (False,) * len(ids), (True,) * len(ids))
    written = mixture.complete([row], max_new_tokens=3)[0]
    scored = model._scored([(ids, list(written.token_ids)), (ids, [written.token_ids[0], 65, 65])])
    assert scored[0].is_greedy.tolist() == [True] * len(written.token_ids)
    assert scored[0].logprobs.tolist() == pytest.approx(written.logprobs, abs=1e-4)
    assert not bool(scored[1].is_greedy.all())


def test_spaces_that_end_a_context_go_to_the_continuation(model):
    one, other = model.loglikelihood([request("loglikelihood", "add 3 ", "4"), request("loglikelihood", "add 3", " 4")])
    assert one == pytest.approx(other)


def test_a_whole_text_is_scored_from_its_first_token(mixture, model):
    found = model.loglikelihood_rolling([request("loglikelihood_rolling", "add 3 4")])
    ids = tokens(mixture, "add 3 4")
    first = mixture.backbone.tokenizer.bos_token_id
    assert math.isfinite(found[0]) and found[0] < 0
    as_pair = model._scored([([first], ids)])[0]
    assert len(as_pair.logprobs) == len(ids)
    assert found[0] == pytest.approx(float(as_pair.logprobs.sum()))


def test_texts_are_continued_until_their_stop_in_the_order_asked(mixture, model, monkeypatch):
    asked = [
        ("add 3 4", {"until": ["\n"], "max_gen_toks": 6}),
        ("SPELL ABCD NOW", {"until": [], "max_gen_toks": 4, "do_sample": False}),
        ("?? (A)", {"until": ["\n"], "max_gen_toks": 6, "temperature": 0.0}),
    ]
    engines, engine = [], type(mixture).engine
    monkeypatch.setattr(type(mixture), "engine", lambda *args, **kw: engines.append(kw) or engine(*args, **kw))
    found = model.generate_until([request("generate_until", *each) for each in asked])
    assert len(engines) == 1, "whatever is asked, it is answered side by side"
    for (text, options), answer in zip(asked, found, strict=True):
        ids = tokens(mixture, text)
        row = TokenRow(tuple(ids), len(ids), (False,) * len(ids), (True,) * len(ids))
        stop = options["until"]
        assert answer == mixture.complete([row], max_new_tokens=options["max_gen_toks"], stop=stop)[0].text


def test_an_option_that_is_not_understood_is_told(model):
    with pytest.raises(CoterieError, match="the task asks for num_beams=4, which is not understood here"):
        model.generate_until([request("generate_until", "add", {"num_beams": 4})])


def test_votes_on_finished_answers_cannot_continue_a_text(mixture):
    with pytest.raises(CoterieError, match="so it continues no text"):
        mixture.replace(router="base", combiner="texts").complete([])


def test_the_harness_evaluates_a_local_task_offline(mixture, model, tmp_path):
    """Accuracy of choosing between two continuations, against the same choice made by hand."""
    rows = [{"question": f"add {a} 1", "right": f" {a + 1}", "wrong": f" {a + 5}"} for a in range(2, 8)]
    write_rows(tmp_path / "test.jsonl", rows)
    task = {
        "task": "local_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{[right, wrong]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    result = lm_eval.simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=False,
    )
    by_hand = [
        naive(mixture, tokens(mixture, row["question"]), tokens(mixture, row["right"]))[0]
        > naive(mixture, tokens(mixture, row["question"]), tokens(mixture, row["wrong"]))[0]
        for row in rows
    ]
    assert result is not None
    assert result["results"]["local_sums"]["acc,none"] == pytest.approx(sum(by_hand) / len(rows))


def test_conversations_are_rendered_with_the_models_template(model):
    turns = [{"role": "user", "content": "add 3 4"}]
    assert model.apply_chat_template(turns).endswith("<s>user\nadd 3 4<e><s>assistant\n")
    assert model.chat_template(True) == tiny.CHAT_TEMPLATE
    assert torch.is_tensor(model._scored([([65], [66])])[0].logprobs)


# --------------------------------------------------------------------------- the same numbers as the harness' own model

TRICKY = [
    ("add 3 4 gives", " 7"),
    ("ends in spaces  ", "4 the"),
    ("", "no context"),
    ("", "<s>begins itself"),
    ("<s>the context begins itself", " and goes on"),
    ("x" * 700, "the beginning is left out"),
    ("a", "b" * 510),
]
ROLLED = ["add 3 4", "<s>begun", "long " * 210, "é한"]
ASKED = [
    ("add 3 4", {"until": ["\n"], "max_gen_toks": 6}),
    ("<s>SPELL", {"until": ["a"], "max_new_tokens": 8, "do_sample": False}),
    ("y" * 600, {"until": [], "max_gen_toks": 20, "temperature": 0.0}),
]


@pytest.fixture(scope="module", params=[None, "<s> $A", "<s> $A <e>"], ids=["adds nothing", "adds bos", "adds both"])
def both(request, mixture, run_folder, tmp_path_factory):
    """One expert of the mixture here, and its adapter as lm-eval's own model loads it, with one tokenizer."""
    from lm_eval.models.huggingface import HFLM

    folder = tiny.save_model(tmp_path_factory.mktemp("harness") / "model")
    if request.param:
        tokenizer = tiny.make_tokenizer()
        special = [(word, tokenizer.convert_tokens_to_ids(word)) for word in ("<s>", "<e>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=request.param, special_tokens=special)
        tokenizer.save_pretrained(folder)
    backbone = load_backbone(ModelSettings(model=str(folder), device="cpu"))
    adapter = run_folder / "experts" / "cluster-0"
    theirs = HFLM(pretrained=str(folder), peft=str(adapter), device="cpu", dtype="float32", batch_size=2)
    ours = dataclasses.replace(mixture, backbone=backbone).replace(router="cluster-0")
    return HarnessModel(ours, batch_size=2), theirs


def test_the_harness_own_model_gives_a_continuation_the_same_likelihood(both):
    requests = [request("loglikelihood", *pair) for pair in TRICKY]
    ours, theirs = (model.loglikelihood(requests) for model in both)
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=2e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_the_harness_own_model_gives_a_text_the_same_likelihood(both):
    requests = [request("loglikelihood_rolling", text) for text in ROLLED]
    ours, theirs = (model.loglikelihood_rolling(requests) for model in both)
    assert ours == pytest.approx(theirs, abs=5e-3)


def test_the_harness_own_model_gives_a_context_the_same_answer(both):
    requests = [request("generate_until", *asked) for asked in ASKED]
    ours, theirs = (model.generate_until(copy.deepcopy(requests)) for model in both)
    assert ours == theirs


def test_a_penalty_that_the_model_asks_for_is_followed(both, monkeypatch):
    asked = [request("generate_until", text, {"until": [], "max_gen_toks": 20}) for text in ("add 3 4", "SPELL A")]
    plain = both[0].generate_until(asked)
    for model in (both[0].mixture.backbone.model, both[1].model):
        monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.5)
    ours, theirs = (model.generate_until(copy.deepcopy(asked)) for model in both)
    assert ours == theirs != plain


def test_a_continuation_without_a_token_of_its_own_is_told(model):
    with pytest.raises(CoterieError, match="the continuation '' has 0 tokens, not 1 to 512"):
        model.loglikelihood([request("loglikelihood", "x", "")])


def test_a_system_prompt_that_the_template_refuses_is_left_out_with_a_word(mixture, caplog):
    tokenizer = tiny.make_tokenizer(GEMMA)
    gemma = dataclasses.replace(mixture, backbone=dataclasses.replace(mixture.backbone, tokenizer=tokenizer))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "add"}]
    text = HarnessModel(gemma).apply_chat_template(turns)
    assert text == "<s><start_of_turn>user\nadd<end_of_turn>\n<start_of_turn>model\n"
    assert "so it is left out" in caplog.text
