"""Rows of every form become the same examples, and examples become tokens whose masks say what is what."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import tiny
from coterie.data.batching import IGNORED, PromptFormat, TokenRow, by_length, pad, tokenise
from coterie.data.examples import Example, Message, from_prompt, load_all, load_examples
from coterie.errors import CoterieError

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
ROW = {"instruction": "Why?", "response": "Because."}

FORMS = {
    "instruction": ROW,
    "prompt": {"prompt": "Why?", "completion": "Because."},
    "messages": {"messages": TURNS},
    "prompt as messages": {"prompt": TURNS[:1], "completion": "Because."},
    "both as messages": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "whole conversation in the prompt": {"prompt": TURNS},
    "nulls for what is absent": {"messages": None, "instruction": None, "prompt": "Why?", "completion": "Because."},
}

TRIMMING = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] | trim + '<e>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
REWRITING = (
    "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ m['role'] + ':' + m['content'] + '<e>' }}"
    "{% else %}{{ '(an answer)' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
SHOUTING = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
DEAF_TO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ '<s>' + m['content'] + '<e>' }}{% endif %}{% endfor %}"
)
REFUSING = "{{ raise_exception('roles must alternate') }}"

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=12).filter(
    str.strip
)
"""Any text at all, but for names of special tokens, which a tokenizer reads as those tokens."""

few = settings(deadline=None, max_examples=40)


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def chat(*contents: str, system: str | None = None) -> Example:
    """A conversation of user and assistant in turn."""
    turns = [Message(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]
    return Example("0", tuple(turns if system is None else [Message("system", system), *turns]))


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def runs(tokenizer, ids, flags) -> list[str]:
    """The texts of the runs of flagged tokens."""
    found, current = [], []
    for token, flag in [*zip(ids, flags, strict=True), (0, False)]:
        if flag:
            current.append(token)
        elif current:
            found.append(decode(tokenizer, current))
            current = []
    return found


def user_texts(tokenizer, row: TokenRow) -> list[str]:
    return runs(tokenizer, row.ids, row.is_user_text)


def trained_texts(tokenizer, row: TokenRow) -> list[str]:
    return runs(tokenizer, row.ids, row.is_response)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.make_tokenizer()


# ------------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_form_of_a_row_gives_the_same_example(row):
    [example] = load_examples([row])
    assert example.messages == (Message("user", "Why?"), Message("assistant", "Because."))
    assert (example.instruction, example.response) == ("Why?", "Because.")
    assert example.prompt == (Message("user", "Why?"),)


@pytest.mark.parametrize("form", ["jsonl", "path", "memory", "json", "csv", "parquet", "folder", "folder of splits"])
def test_every_source_gives_the_same_examples(form, tmp_path, monkeypatch):
    rows = [{"id": f"r{n}", "source": "s", **ROW, "answer": str(n)} for n in range(3)]
    file = write_lines(tmp_path / "rows.jsonl", *map(json.dumps, rows))
    source = {"jsonl": str(file), "path": file, "memory": rows}.get(form) or as_dataset(
        form, rows, tmp_path, monkeypatch
    )
    messages = (Message("user", "Why?"), Message("assistant", "Because."))
    assert load_examples(source) == [Example(f"r{n}", messages, "s", None, str(n)) for n in range(3)]


def as_dataset(form: str, rows: list[dict], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    data = datasets.Dataset.from_list(rows)
    path = folder / f"rows.{form}"
    if form.startswith("folder"):
        path = folder / "saved"
        whole = datasets.DatasetDict({"test": data.select([0]), "train": data}) if form == "folder of splits" else data
        whole.save_to_disk(path)
    else:
        getattr(data, f"to_{form}")(str(path))
    return str(path)


def test_a_folder_of_splits_without_a_train_split_is_told(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"test": datasets.Dataset.from_list([ROW])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(CoterieError, match="saved cannot be loaded .the folder has the splits test and no train"):
        load_examples(tmp_path / "saved")


def test_rows_of_several_forms_share_a_table(tmp_path, monkeypatch):
    """A table fills in nulls: a row of one form has empty columns of the other."""
    source = as_dataset("parquet", [ROW | {"messages": None}, {"messages": TURNS}], tmp_path, monkeypatch)
    one, other = load_examples(source)
    assert one.messages == other.messages


def test_optional_fields_become_texts_and_nothing_else_is_kept():
    row = ROW | {"id": 7, "source": "maths", "category": None, "answer": 42, "extra": object()}
    [example] = load_examples([row])
    assert (example.id, example.source, example.category, example.answer) == ("7", "maths", None, "42")


def test_accepted_answers_and_a_programs_tests_are_kept_as_they_stand():
    tests = {"entry_point": "f", "test_list": ["assert f(1) == 2"], "test_setup_code": ""}
    [example] = load_examples([ROW | {"answers": ["10th century", " the 10th century"], "tests": tests}])
    assert example.answers == ("10th century", " the 10th century")
    assert example.tests == tests
    assert json.loads(json.dumps(asdict(example)))["tests"] == tests


def test_no_answers_differ_from_an_empty_list_of_answers_which_says_that_there_is_none():
    absent, null, empty = load_examples([ROW, ROW | {"answers": None, "tests": None}, ROW | {"answers": []}])
    assert (absent.answers, absent.tests) == (null.answers, null.tests) == ((), None)
    assert empty.answers == ("",)


def test_examples_with_tests_can_be_members_of_a_set():
    first, second = load_examples([ROW | {"id": "a", "tests": {"n": number}} for number in (1, 2)])
    assert first != second
    assert len({first, second, replace(first)}) == 2


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_answers_and_tests_survive_a_file_and_a_table(form, tmp_path, monkeypatch):
    row = ROW | {"answers": ["one", "two"], "tests": {"test_list": ["assert f(1) == 2"]}}
    file = str(write_lines(tmp_path / "rows.jsonl", json.dumps(row)))
    [example] = load_examples(file if form == "jsonl" else as_dataset(form, [row], tmp_path, monkeypatch))
    assert (example.answers, example.tests) == (("one", "two"), {"test_list": ["assert f(1) == 2"]})


def test_tests_that_json_cannot_hold_are_told():
    endless: dict = {}
    endless["self"] = endless
    for tests in ({"when": {1, 2}}, endless):
        with pytest.raises(CoterieError, match="row 1 of the data: tests must hold plain JSON .*; give texts, numbers"):
            load_examples([ROW | {"tests": tests}])


def test_rows_without_an_id_are_numbered_and_blank_lines_are_skipped(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", json.dumps(ROW), "", "  ", json.dumps(ROW))
    assert [example.id for example in load_examples(path)] == ["0", "1"]


def test_the_limit_keeps_the_first_rows_of_every_source(tmp_path):
    sources = [
        str(write_lines(tmp_path / f"{name}.jsonl", *(json.dumps(ROW | {"id": f"{name}{n}"}) for n in range(3))))
        for name in "ab"
    ]
    assert [example.id for example in load_all(sources, limit=2)] == ["a0", "a1", "b0", "b1"]
    assert len(load_all(sources, limit=9)) == 6


def test_the_limit_leaves_later_bad_rows_unread(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", json.dumps(ROW), json.dumps(ROW), "broken")
    assert len(load_examples(path, limit=1)) == 1


@few
@given(st.lists(st.sampled_from(["a", "b", "a#2", "a#3", "a#2#2", ""]), min_size=1, max_size=12))
def test_ids_are_unique_and_the_first_row_of_an_id_keeps_it(tmp_path_factory, ids):
    rows = [json.dumps(ROW | {"id": name}) for name in ids]
    path = write_lines(tmp_path_factory.mktemp("ids") / "rows.jsonl", *rows)
    found = [example.id for example in load_all([str(path)])]
    assert len(set(found)) == len(ids)
    assert all(new.startswith(old) for new, old in zip(found, ids, strict=True))
    assert found[0] == ids[0]


def test_separators_of_lines_inside_a_json_text_do_not_end_the_line(tmp_path):
    text = "one\u2028two\u2029three\x85four\x0bfive\x1csix"
    row = json.dumps({"instruction": text, "response": text}, ensure_ascii=False)
    [example] = load_examples(write_lines(tmp_path / "rows.jsonl", row))
    assert example.instruction == text == example.response


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n" + json.dumps(ROW).encode() + b"\r\n")
    assert len(load_examples(path)) == 2


def test_a_prompt_without_an_answer_is_taken_where_none_is_needed():
    [example] = load_examples([{"instruction": "Why?"}], need_response=False)
    assert example == from_prompt("Why?")
    assert example.response is None and example.prompt == example.messages


BAD_LINES = {
    "broken JSON": ('{"instruction": ', r"line 2 is not valid JSON \(Expecting value.*; mend or delete the line"),
    "a list": ("[1]", r"line 2 holds a list, not an object with messages, conversations, instruction\+response"),
    "no known field": (
        '{"q": 1, "a": 2}',
        r"line 2 has the fields q, a; rows have the form messages, ",
    ),
    "no field": ("{}", r"line 2 has the fields \(none\); rows have the form"),
    "no response": ('{"instruction": "x"}', r"line 2 has no response among instruction; rows have the form"),
    "null response": ('{"prompt": "x", "completion": null}', r"line 2 has an empty response; fill it in"),
    "only a response": ('{"response": "x"}', r"line 2 has the fields response; rows"),
    "a missing prompt": ('{"instruction": null, "response": "x"}', r"line 2 has an empty prompt; fill it in"),
    "empty prompt": ('{"instruction": " \\n", "response": "x"}', r"line 2 has an empty prompt; fill it in"),
    "empty response": ('{"instruction": "x", "response": ""}', r"line 2 has an empty response; fill it in"),
    "a number": ('{"instruction": 7, "response": "x"}', r"line 2: instruction must be a text, but is a int"),
    "a number as response": ('{"prompt": "x", "completion": 7}', r"line 2: completion must be a text"),
    "no messages": ('{"messages": []}', r"line 2: messages must be a list of \{role, content\}, got an empty list"),
    "text as messages": ('{"messages": "x"}', r"line 2: messages must be a list of .* got a str"),
    "bad role": (
        '{"messages": [{"role": "tool", "content": "x"}]}',
        r"line 2: every message needs a role \(system, user",
    ),
    "no content": (
        '{"messages": [{"role": "user", "content": null}]}',
        r"line 2: every message needs a role .* a text",
    ),
    "a text as message": ('{"messages": ["x"]}', r"line 2: every message needs a role"),
    "no user": ('{"messages": [{"role": "assistant", "content": "x"}]}', r"line 2 has no user message"),
    "question last": (json.dumps({"messages": [*TURNS, TURNS[0]]}), r"line 2 has no response"),
    "half a character": (r'{"instruction": "x\ud800", "response": "x"}', r"line 2 holds the half character '\\ud800'"),
    "a text as answers": (
        json.dumps(ROW | {"answers": "Paris"}),
        r"line 2: answers must be a list of texts, but is a str",
    ),
    "SQuAD's own answers": (json.dumps(ROW | {"answers": {"text": ["x"]}}), r"answers must be a list .* but is a dict"),
    "a number in answers": (json.dumps(ROW | {"answers": ["7", 0]}), r"line 2: answers must be .* but holds a int"),
    "a list as tests": (json.dumps(ROW | {"tests": ["assert f()"]}), r"line 2: tests must be an object, but is a list"),
    "half a character in answers": (json.dumps(ROW | {"answers": ["a", "\ud800"]}), r"line 2 holds the half char"),
    "half a character in tests": (json.dumps(ROW | {"tests": {"a": ["\ud800"]}}), r"line 2 holds the half character"),
    "half a character in an id": (r'{"id": "\udfff", "prompt": "x", "completion": "x"}', r"line 2 holds the half char"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_told_with_its_file_and_number(line, message, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", json.dumps(ROW), line)
    with pytest.raises(CoterieError, match=message) as caught:
        load_examples(path)
    assert str(caught.value).startswith(f"{path}, line 2")
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_told_with_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"instruction": "caf\xe9", "response": "x"}\n')
    with pytest.raises(CoterieError, match=r"rows\.jsonl, line 2 is not valid JSON .*0xe9"):
        load_examples(path)


def test_a_bad_row_in_memory_is_told_with_its_number():
    with pytest.raises(CoterieError, match="row 2 of the data has no response"):
        load_examples([ROW, {"instruction": "x"}])


@pytest.mark.parametrize("content", ["", "\n \n"], ids=["empty", "blank lines"])
def test_a_file_without_rows_is_told(content, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(CoterieError, match=r"rows\.jsonl holds no examples; rows have the form messages, "):
        load_examples(tmp_path / "rows.jsonl")


def test_no_rows_in_memory_are_told():
    with pytest.raises(CoterieError, match="the data holds no examples"):
        load_examples([])


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "./missing/folder/x"])
def test_a_missing_file_is_told_by_name(name, tmp_path):
    if not name.endswith(".jsonl"):
        pytest.importorskip("datasets")
    with pytest.raises(CoterieError, match=r"missing.*; give a .* or a datasets source"):
        load_examples(str(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "message"), [(" \n", "prompt 3 is empty"), ("x\udc80", "prompt 3 holds the half char")]
)
def test_a_prompt_that_is_no_text_is_told_with_its_number(text, message):
    with pytest.raises(CoterieError, match=message):
        from_prompt(text, 2)


# ---------------------------------------------------------------------------------------------------------- tokens


@few
@given(contents=st.lists(texts, min_size=2, max_size=6), system=st.none() | texts)
def test_a_row_is_the_rendered_conversation_up_to_its_last_end_of_turn(tokenizer, contents, system):
    contents = contents[: len(contents) // 2 * 2]
    example = chat(*contents, system=system)
    row = PromptFormat(tokenizer).row(example)
    turns = [{"role": m.role, "content": m.content} for m in example.messages]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole.endswith("<e>")
    assert list(row.ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]


@few
@given(contents=st.lists(texts, min_size=1, max_size=6), system=st.none() | texts | st.just(""))
@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, TRIMMING, None], ids=["as it is", "trimming", "plain"])
def test_every_answer_is_trained_and_every_question_is_marked(template, contents, system):
    tokenizer = tiny.make_tokenizer(template)
    row = PromptFormat(tokenizer, system).row(chat(*contents))
    questions, answers = contents[::2], contents[1::2]
    written = [answer.strip() if template == TRIMMING else answer for answer in answers]
    assert trained_texts(tokenizer, row) == [answer + "<e>" for answer in written]
    assert user_texts(tokenizer, row) == [question.strip() for question in questions]
    assert not any(a and b for a, b in zip(row.is_response, row.is_user_text, strict=True))


@pytest.mark.parametrize("text", ["s", "user", "Be kind.", "system\nBe", "assistant", "e", "user\nuser\nuser"])
def test_words_that_the_template_also_has_are_marked_in_the_users_place_only(tokenizer, text):
    row = PromptFormat(tokenizer, system_prompt=text).row(chat(text, text, text))
    assert user_texts(tokenizer, row) == [text, text]
    place = decode(tokenizer, row.ids[: row.is_user_text.index(True)])
    assert place == f"<s>system\n{text}<e><s>user\n"


@few
@given(contents=st.lists(texts, min_size=1, max_size=5), system=st.none() | texts)
def test_the_prompt_is_a_prefix_and_equals_the_conversation_without_its_answer(tokenizer, contents, system):
    prompts = PromptFormat(tokenizer, system)
    row = prompts.row(chat(*contents))
    asked = contents if len(contents) % 2 else contents[:-1]
    alone = prompts.row(chat(*asked))
    assert row.prompt() == alone == alone.prompt()
    assert row.ids[: len(alone.ids)] == alone.ids
    assert row.prompt_length == len(alone.ids)
    assert (len(row.ids) > len(alone.ids)) == (len(asked) < len(contents))


def test_the_prompt_is_a_prefix_where_a_token_could_reach_from_the_template_into_the_answer():
    """With the merge "newline a", the last newline of the template would become one token with the answer's a."""
    core = json.loads(tiny.make_tokenizer().backend_tokenizer.to_str())
    core["model"]["vocab"]["Ċa"] = 256
    core["model"]["merges"] = ["Ċ a"]
    core["added_tokens"] = [token | {"id": token["id"] + 1} for token in core["added_tokens"]]
    base = tiny.make_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(base.backend_tokenizer).from_str(json.dumps(core)), eos_token="<e>", pad_token="<p>"
    )
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    assert 256 in tokenizer("<s>assistant\na")["input_ids"]
    prompts = PromptFormat(tokenizer)
    row = prompts.row(chat("Why?", "a reason"))
    assert row.prompt() == prompts.row(chat("Why?"))
    assert trained_texts(tokenizer, row) == ["a reason<e>"]


def test_labels_are_the_tokens_of_the_answers_and_ignored_elsewhere(tokenizer):
    row = PromptFormat(tokenizer).row(chat("one", "two", "three", "four"))
    labels = row.labels()
    assert len(labels) == len(row.ids)
    assert decode(tokenizer, [label for label in labels if label != IGNORED]) == "two<e>four<e>"
    assert all(label in (IGNORED, token) for label, token in zip(labels, row.ids, strict=True))


@pytest.mark.parametrize(
    ("system", "beginning"),
    [(None, "<s>system\nBe kind.<e>"), ("Be brief.", "<s>system\nBe brief.<e>"), ("", "<s>system\n<e>")],
    ids=["the template's own", "another", "empty"],
)
def test_the_system_prompt_stands_first(tokenizer, system, beginning):
    row = PromptFormat(tokenizer, system).row(chat("x", "y"))
    assert decode(tokenizer, row.ids) == f"{beginning}<s>user\nx<e><s>assistant\ny<e>"


def test_a_conversation_keeps_the_system_prompt_that_it_brings(tokenizer):
    row = PromptFormat(tokenizer, "Be brief.").row(chat("x", "y", system="Be long."))
    assert decode(tokenizer, row.ids).startswith("<s>system\nBe long.<e><s>user\nx<e>")


def test_without_a_chat_template_turns_are_lines_and_answers_end_with_the_end_token():
    tokenizer = tiny.make_tokenizer(chat_template=None)
    row = PromptFormat(tokenizer, "Be brief.").row(chat("one", "two", "three", "four"))
    assert decode(tokenizer, row.ids) == "Be brief.\none\ntwo<e>three\nfour<e>"


@pytest.mark.parametrize("template", [None, tiny.CHAT_TEMPLATE], ids=["plain", "template"])
def test_the_beginning_token_is_added_once_and_only_where_no_template_writes_it(template):
    tokenizer = tiny.make_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    row = PromptFormat(tokenizer).row(chat("one", "two", "three", "four"))
    turns = 1 if template is None else 5
    assert row.ids[0] == tokenizer.bos_token_id
    assert row.ids.count(tokenizer.bos_token_id) == turns
    assert not row.is_user_text[0] and not row.is_response[0]


@pytest.mark.parametrize(
    ("template", "example", "message"),
    [
        (SHOUTING, chat("words", "reply"), "changes what a user wrote: 'words'"),
        (REFUSING, chat("a", "b"), "does not take such a conversation: roles must alternate"),
    ],
    ids=["shouts", "refuses"],
)
def test_a_template_that_cannot_be_followed_is_told(template, example, message):
    with pytest.raises(CoterieError, match=message):
        PromptFormat(tiny.make_tokenizer(template)).row(example)


def test_a_tokenizer_without_offsets_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(CoterieError, match="gives no character offsets"):
        PromptFormat(tokenizer)


# --------------------------------------------------------------------------------------------------------- batches


def test_rows_that_are_too_long_are_dropped_whole_and_counted(tokenizer, caplog):
    prompts = PromptFormat(tokenizer)
    examples = [chat("x", "y" * n) for n in (5, 60, 6, 70)]
    rows = [prompts.row(example) for example in examples]
    with caplog.at_level(logging.WARNING):
        kept = tokenise(prompts, examples, len(rows[2].ids))
    assert (list(kept.examples), list(kept.rows), kept.dropped) == ([examples[0], examples[2]], [rows[0], rows[2]], 2)
    assert f"dropped 2 of 4 examples longer than {len(rows[2].ids)} tokens" in caplog.text


def test_rows_that_all_are_too_long_are_told_with_the_shortest(tokenizer):
    prompts = PromptFormat(tokenizer)
    shortest = len(prompts.row(chat("x", "y")).ids)
    with pytest.raises(CoterieError, match=f"all 2 examples are longer than 8 tokens .the shortest has {shortest}"):
        tokenise(prompts, [chat("x", "y"), chat("x", "yy")], 8)


@few
@given(
    rows=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    extra=st.none() | st.integers(0, 3),
)
def test_padding_fills_one_side_and_positions_count_from_the_first_token(rows, side, extra):
    longest = max(map(len, rows))
    length = None if extra is None else longest + extra
    batch = pad(rows, 100, side=side, length=length)
    assert batch.input_ids.shape == (len(rows), length or longest)
    for number, row in enumerate(rows):
        room = (length or longest) - len(row)
        own = slice(room, None) if side == "left" else slice(0, len(row))
        assert batch.input_ids[number, own].tolist() == row
        assert batch.position_ids[number, own].tolist() == list(range(len(row)))
        assert batch.attention_mask[number, own].tolist() == [1] * len(row)
        assert batch.attention_mask[number].sum() == len(row)
        assert (batch.input_ids[number] == 100).sum() == room


def test_padded_tensors_are_integers_on_the_device_asked_for():
    batch = pad([[1, 2], [3]], 0, device=torch.device("meta"))
    assert {tensor.dtype for tensor in batch} == {torch.int64}
    assert {tensor.device.type for tensor in batch} == {"meta"}


@few
@given(lengths=st.lists(st.integers(1, 9), max_size=20), size=st.integers(1, 6))
def test_batches_by_length_hold_every_row_once_and_go_from_long_to_short(lengths, size):
    rows = [TokenRow((0,) * n, n, (False,) * n, (True,) * n) for n in lengths]
    batches = by_length(rows, size)
    order = [number for batch in batches for number in batch]
    assert sorted(order) == list(range(len(rows)))
    assert all(len(batch) == size for batch in batches[:-1])
    assert order == sorted(order, key=lambda number: (-lengths[number], number))
