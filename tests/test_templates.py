"""Chat templates of public families on every kind of tokenizer: which tokens are read, which trained, which end."""

import json
import logging
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
import tokenizers_of_kinds
from chat_templates import FAMILIES
from conftest import FIT, write_rows
from coterie import methods
from coterie.data.batching import PromptFormat, tokenise
from coterie.data.chat import EMPTY_THOUGHT, LAST_ANSWER_ONLY, SYSTEM_IN_QUESTION
from coterie.data.examples import Example, Message
from coterie.errors import CoterieError
from coterie.mixture import Mixture

words = st.text(min_size=1, max_size=12).filter(str.strip)
each_family = pytest.mark.parametrize("family", FAMILIES)
each_kind = pytest.mark.parametrize("kind", tokenizers_of_kinds.KINDS)
OTHERWISE = ("deepseek-r1", "endless")
"""Families whose own text of a conversation is not the prompt with its answer and an end."""


def made(family, kind="byte-level", adds="", *, crossing=False):
    template, special, eos, _, bos = FAMILIES[family]
    names = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    return tokenizers_of_kinds.make(kind, template, list(special), adds, crossing=crossing, **names)


def chat(*contents, system=None):
    turns = [Message(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]
    return Example("row-1", tuple([Message("system", system), *turns] if system else turns))


def rendered(tokenizer, example, generation=False):
    turns = [{"role": m.role, "content": m.content} for m in example.messages]
    if tokenizer.chat_template is None:
        return "".join(m.content + ("</s>" if m.role == "assistant" else "\n") for m in example.messages)
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)


def parts(tokenizer, row):
    """The texts of a row's prompt and of its trained answer."""
    n = row.prompt_length
    return tuple(tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (row.ids[:n], row.ids[n:]))


def trained(tokenizer, row):
    return tokenizer.decode([i for i, t in zip(row.ids, row.is_response, strict=True) if t])


@each_kind
@each_family
def test_the_last_token_that_is_trained_ends_the_turn(family, kind):
    tokenizer = made(family, kind)
    prompts = PromptFormat(tokenizer)
    assert prompts.end == FAMILIES[family].end
    for example in (chat("add the 4", "four"), chat("add", " no thing ", "the?", "the answer\nis\n\nfour\n")):
        row = prompts.row(example)
        assert row.is_response[-1]
        assert row.ids[-1] in prompts.end_ids
        assert row.ids[row.prompt_length :].count(row.ids[-1]) == 1


@each_kind
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in OTHERWISE])
@pytest.mark.parametrize("answer", ["four", "the answer is", "한국어 é\n", "the\n\n1 2"])
def test_a_row_has_the_tokens_of_the_templates_whole_text(family, kind, answer):
    tokenizer = made(family, kind)
    example = chat("add the 4?", answer)
    whole, end = rendered(tokenizer, example), FAMILIES[family].end
    whole = whole[: whole.rindex(end) + len(end)]
    assert list(PromptFormat(tokenizer).row(example).ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]


@each_kind
@each_family
@pytest.mark.parametrize(
    "contents", [("add", "four"), ("add", "no", "the four", "is"), ("the", "\nfour"), ("a", "  b")]
)
def test_a_prompt_has_the_same_tokens_in_training_and_in_generation(family, kind, contents):
    tokenizer = made(family, kind)
    prompts = PromptFormat(tokenizer)
    row, asked = prompts.row(chat(*contents)), prompts.row(chat(*contents[:-1]))
    assert row.prompt() == asked
    text = rendered(tokenizer, chat(*contents[:-1]), generation=True)
    header = {"vicuna": "ASSISTANT:"}.get(family, "")
    assert list(asked.ids) == tokenizer(text + header, add_special_tokens=False)["input_ids"]


@each_kind
@pytest.mark.parametrize("family", ["chatml", "gemma", "mistral", "plain"])
@settings(max_examples=12, deadline=None)
@given(asked=words, answer=words)
def test_any_text_is_read_and_trained_as_it_stands(family, kind, asked, answer):
    tokenizer = made(family, kind)
    prompts = PromptFormat(tokenizer)
    row = prompts.row(chat(asked, answer))
    whole = rendered(tokenizer, chat(asked, answer))
    whole = tokenizer(whole[: whole.rindex(prompts.end) + len(prompts.end)], add_special_tokens=False)["input_ids"]
    assert row.prompt() == prompts.row(chat(asked))
    assert row.ids[-1] in prompts.end_ids
    assert tokenizer.decode(row.ids) == tokenizer.decode(whole)
    assert list(row.ids) == whole or list(row.ids[: row.prompt_length]) != whole[: row.prompt_length]


@pytest.mark.parametrize("kind", ["metaspace", "byte-fallback"])
def test_an_answer_has_no_space_that_a_text_of_its_own_would_begin_with(kind):
    tokenizer = made("chatml", kind)
    row = PromptFormat(tokenizer).row(chat("add", "four"))
    assert tokenizer.convert_ids_to_tokens(row.ids)[row.prompt_length :] == ["four", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("four", add_special_tokens=False)["input_ids"]) == ["▁four"]


@each_kind
@pytest.mark.parametrize("family", ["chatml", "gemma", "llama-3", "plain"])
def test_where_a_token_reaches_from_the_prompt_into_the_answer_the_prompt_is_trusted(family, kind):
    tokenizer = made(family, kind, crossing=True)
    prompts = PromptFormat(tokenizer)
    row, asked = prompts.row(chat("add", "four is")), prompts.row(chat("add"))
    whole = rendered(tokenizer, chat("add", "four is"))
    whole = tokenizer(whole[: whole.rindex(prompts.end) + len(prompts.end)], add_special_tokens=False)["input_ids"]
    assert list(row.ids) != whole
    assert row.prompt() == asked
    assert tokenizer.decode(row.ids) == tokenizer.decode(whole)
    assert tokenizer.decode(row.ids[row.prompt_length :]).strip() == f"four is{prompts.end}"


@pytest.mark.parametrize("kind", ["metaspace", "byte-fallback", "byte-level"])
def test_words_behind_a_question_have_the_tokens_that_an_answer_has(kind):
    tokenizer = made("chatml", kind)
    prompts = PromptFormat(tokenizer)
    assert tokenizer.convert_ids_to_tokens(prompts.following(chat("add"), "four")) == ["four"]
    spaced = ["Ġ", "four"] if kind == "byte-level" else ["▁four"]
    assert tokenizer.convert_ids_to_tokens(prompts.following(chat("add"), " four")) == spaced


def test_without_an_end_of_text_the_template_alone_ends_a_turn():
    template, special, *_ = FAMILIES["chatml"]
    tokenizer = tokenizers_of_kinds.make("byte-level", template, list(special))
    assert tokenizer.eos_token is None and tokenizer.pad_token is None
    row = PromptFormat(tokenizer).row(chat("add", "four"))
    assert tokenizer.decode(row.ids[row.prompt_length :]) == "four<|im_end|>"
    tokenizer.chat_template = None
    prompts = PromptFormat(tokenizer)
    assert (prompts.end, prompts.end_ids) == ("", frozenset())
    row = prompts.row(chat("add", "four", "the", "is"))
    assert parts(tokenizer, row) == ("add\nfour\nthe\n", "is")
    assert trained(tokenizer, row) == "fouris"


@each_family
def test_what_the_user_wrote_is_marked(family):
    tokenizer = made(family)
    row = PromptFormat(tokenizer).row(chat("user: the", "no", "assistant", "four"))
    asked = [i for i, own in zip(row.ids, row.is_user_text, strict=True) if own]
    assert tokenizer.decode(asked) == "user: theassistant"


@pytest.mark.parametrize("adds", ["<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("family", ["mistral", "zephyr", "plain"])
def test_what_the_tokenizer_adds_itself_stands_once_and_never_between_prompt_and_answer(family, adds):
    tokenizer = made(family, adds=adds)
    row = PromptFormat(tokenizer).row(chat("add", "four"))
    prompt, answer = parts(tokenizer, row)
    begins = {"mistral": "<s>", "zephyr": "", "plain": "<s>" if adds.startswith("<s>") else ""}[family]
    asked = {"mistral": "[INST] add [/INST]", "zephyr": "<|user|>\nadd</s>\n<|assistant|>\n", "plain": "add\n"}[family]
    assert prompt == begins + asked
    assert answer.strip() == "four</s>"


# ----------------------------------------------------------------------------------------------- what has a note


@pytest.mark.parametrize(
    ("family", "example", "prompt", "answer", "notes"),
    [
        (
            "deepseek-r1",
            chat("add", "four"),
            "<s><|User|>add<|Assistant|><think>\n",
            "\n</think>\n\nfour</s>",
            (EMPTY_THOUGHT,),
        ),
        (
            "deepseek-r1",
            chat("add", "<think>\nno</think>four"),
            "<s><|User|>add<|Assistant|><think>\n",
            "no</think>four</s>",
            (),
        ),
        (
            "deepseek-r1",
            chat("add", "no", "the", "hm</think>is"),
            "<s><|User|>add<|Assistant|>no</s><|User|>the<|Assistant|><think>\n",
            "hm</think>is</s>",
            (LAST_ANSWER_ONLY,),
        ),
        (
            "qwen3",
            chat("add", "<think>\nno\n</think>\n\nfour", "the", "<think>\nhm\n</think>\n\nis"),
            "<|im_start|>user\nadd<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n"
            "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n",
            "<think>\nhm\n</think>\n\nis<|im_end|>",
            (LAST_ANSWER_ONLY,),
        ),
        (
            "qwen3",
            chat("add", "four"),
            "<|im_start|>user\nadd<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nfour<|im_end|>",
            (),
        ),
        (
            "gemma",
            chat("add", "four", system="Be brief."),
            "<bos><start_of_turn>user\nBe brief.\n\nadd<end_of_turn>\n<start_of_turn>model\n",
            "four<end_of_turn>",
            (SYSTEM_IN_QUESTION,),
        ),
        ("vicuna", chat("add", "four"), "USER: add ASSISTANT:", " four</s>", ()),
        ("endless", chat("add", "four"), "### user:\nadd\n\n### assistant:\n", "four</s>", ()),
        ("endless", chat("add", "no</s>four"), "### user:\nadd\n\n### assistant:\n", "no</s>four</s>", ()),
        (
            "gemma",
            chat("a", "b"),
            "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n",
            "b<end_of_turn>",
            (),
        ),
        ("phi-3", chat("add", "four"), "<|user|>\nadd<|end|>\n<|assistant|>\n", "four<|end|>", ()),
    ],
)
def test_rows_of_templates_with_ways_of_their_own(family, example, prompt, answer, notes):
    tokenizer = made(family)
    row, noted = PromptFormat(tokenizer).row_and_notes(example)
    assert parts(tokenizer, row) == (prompt, answer)
    assert trained(tokenizer, row) == answer
    assert noted == notes


def test_an_answer_that_a_template_would_change_is_trained_as_the_row_has_it():
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'].split('#')[0] + ';' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    for names in ({"eos_token": "</s>"}, {}):
        tokenizer = tokenizers_of_kinds.make("byte-level", template, ["</s>"], **names)
        row = PromptFormat(tokenizer).row(chat("add", "a # b"))
        assert parts(tokenizer, row) == ("user:add;assistant:", "a # b;" + names.get("eos_token", ""))


def test_the_system_prompt_that_stands_before_a_question_is_not_the_users():
    tokenizer = made("gemma")
    row = PromptFormat(tokenizer, "Be brief.").row(chat("add", "four"))
    assert tokenizer.decode([i for i, own in zip(row.ids, row.is_user_text, strict=True) if own]) == "add"


def test_a_system_prompt_that_stands_elsewhere_is_told_once_where_prompts_are_asked(caplog):
    prompts = PromptFormat(made("gemma"), "Be brief.")
    for text in ("add", "the"):
        prompts.row(chat(text))
    assert [record.message for record in caplog.records] == [SYSTEM_IN_QUESTION]


def test_notes_are_counted_in_one_line(caplog):
    prompts = PromptFormat(made("gemma"))
    examples = [chat("add", "four", system="Be brief."), chat("add", "four"), chat("the", "is", system="Be kind.")]
    with caplog.at_level(logging.WARNING):
        tokenise(prompts, examples, 500)
    assert [record.message for record in caplog.records] == [f"in 2 of 3 examples {SYSTEM_IN_QUESTION}"]


# ------------------------------------------------------------------------------------------------- from end to end


@pytest.fixture(scope="module")
def gemma_run(tmp_path_factory):
    """A mixture on a tiny model of Gemma's shape, whose turns do not end with its end of text."""
    folder = tmp_path_factory.mktemp("gemma")
    tokenizer = made("gemma")
    model = tiny.make_model(len(tokenizer))
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            0,
        )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"instruction": f"say {number}", "response": "yes"} for number in range(16)]
    data = write_rows(folder / "rows.jsonl", rows)
    options = FIT | {"clusters": 2, "epochs": 4, "learning_rate": 2e-2}
    methods.elrea(str(folder / "model"), str(data), output=folder / "run", device="cpu", **options)
    return folder / "run"


def test_a_mixture_that_learned_its_answers_ends_them(gemma_run):
    mixture = Mixture.from_pretrained(gemma_run, device="cpu")
    assert mixture.prompts.end == "<end_of_turn>" != mixture.backbone.tokenizer.eos_token
    for combiner in ("logits", "layers"):
        answer = mixture.replace(combiner=combiner).generate(["say 3"], max_new_tokens=12)[0]
        assert (answer.text, answer.finish_reason) == ("yes", "stop")
        assert answer.token_ids[-1] in mixture.prompts.end_ids


def test_the_end_of_turn_is_kept_with_the_mixture_and_else_read_off_the_template(gemma_run, tmp_path):
    record = json.loads((gemma_run / "mixture.json").read_text())
    assert record["end_of_turn"] == "<end_of_turn>"
    copy = shutil.copytree(gemma_run, tmp_path / "run")
    ends = []
    for change in ({"end_of_turn": "<start_of_turn>"}, {}):
        (copy / "mixture.json").write_text(json.dumps({k: v for k, v in record.items() if k != "end_of_turn"} | change))
        mixture = Mixture.from_pretrained(copy, device="cpu")
        ends.append(mixture.prompts.end)
        row = mixture.prompts.row(chat("add", "four"))
        assert mixture.backbone.tokenizer.decode(row.ids[-1]) == ends[-1]
    assert ends == ["<start_of_turn>", "<end_of_turn>"]


@pytest.mark.parametrize(
    ("end", "message"),
    [("<end>", "answers shall end with '<end>', which this model's tokenizer does not know"), (3, "'end_of_turn'")],
)
def test_an_end_of_turn_that_the_tokenizer_lacks_is_told(end, message, gemma_run, tmp_path):
    copy = shutil.copytree(gemma_run, tmp_path / "run")
    record = json.loads((copy / "mixture.json").read_text())
    (copy / "mixture.json").write_text(json.dumps(record | {"end_of_turn": end}))
    with pytest.raises(CoterieError, match=message):
        Mixture.from_pretrained(copy, device="cpu")
