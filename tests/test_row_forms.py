"""Rows as the field writes them: each form with its exact prompt, each kind of file, and nothing lost in silence."""

import gzip
import json
import tracemalloc
import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tiny
from coterie.data import files
from coterie.data.batching import PromptFormat
from coterie.data.examples import MAX_CHARACTERS, MAX_DEPTH, Example, load_all, load_examples, read_all
from coterie.data.forms import (
    HISTORY,
    LABELS,
    MAX_MESSAGES,
    PASSAGES,
    REFUSED,
    REFUSED_IN_MESSAGES,
    RENDERED,
    ROLES,
    ROW_FORMS,
    SPOKEN,
    SYSTEM_PROMPTS,
    WEIGHTS,
)
from coterie.data.streaming import COPY, EXCLUDED_QUESTION, index_pools, question_of, text_of
from coterie.errors import CoterieError
from coterie.evaluation.few_shot import with_shots
from coterie.methods.common import hash_examples
from coterie.mixture.folder import reading_for
from coterie.settings.reading import from_flat
from coterie.settings.rows import INPUT_TEMPLATE, ReadingSettings

ROW = {"instruction": "Why?", "response": "Because."}
ASKED, REPLIED = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SHARED = Path("/work/shared/data")

few = settings(deadline=None, max_examples=60)


def turns(row: dict, **reading: str) -> list[tuple[str, str]]:
    """The conversation of a row, as roles and texts."""
    [found] = load_examples([row], reading=from_flat(ReadingSettings, reading))
    return [(message.role, message.content) for message in found.messages]


def written(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------------------------ forms

SAID_BEFORE = [("user", "And?"), ("assistant", "So.")]
AS_WRITTEN = {
    # name: (a row as its users write it, the conversation that it is)
    "dolly": (
        {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.", "category": "closed_qa"},
        [("user", "Who?\n\nAda wrote it."), ("assistant", "Ada.")],
    ),
    "dolly without a passage": (
        {"instruction": "Who?", "context": "", "response": "Ada.", "category": "open_qa"},
        [("user", "Who?"), ("assistant", "Ada.")],
    ),
    "Alpaca": (
        {
            "instruction": "Add.",
            "input": "1 and 2",
            "output": "3",
            "text": "Below ...\n\nAdd.\n\n### Input:\n1 and 2\n\n3",
        },
        [("user", "Add.\n\n1 and 2"), ("assistant", "3")],
    ),
    "Alpaca without an input": (
        {"instruction": "Add 1 and 2.", "input": " ", "output": "3"},
        [("user", "Add 1 and 2."), ("assistant", "3")],
    ),
    "GPTeacher": (
        {"instruction": "Add.", "input": "1 and 2", "response": "3"},
        [("user", "Add.\n\n1 and 2"), ("assistant", "3")],
    ),
    "LLaMA-Factory": (
        {
            "instruction": "Why?",
            "input": "(rain)",
            "output": "Clouds.",
            "system": "Be brief.",
            "history": [["And?", "So."]],
        },
        [("system", "Be brief."), *SAID_BEFORE, ("user", "Why?\n\n(rain)"), ("assistant", "Clouds.")],
    ),
    "LLaMA-Factory with nothing before": (
        {"instruction": "Why?", "input": "", "output": "Clouds.", "system": "", "history": []},
        [("user", "Why?"), ("assistant", "Clouds.")],
    ),
    "ShareGPT": (
        {"id": "a_0", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Clouds."}]},
        [("user", "Why?"), ("assistant", "Clouds.")],
    ),
    "SlimOrca": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": "Why?", "weight": 0.0},
                {"from": "gpt", "value": "Clouds.", "weight": 1.0},
            ]
        },
        [("system", "Be brief."), ("user", "Why?"), ("assistant", "Clouds.")],
    ),
    "ShareGPT with a system prompt beside": (
        {"system": "Be brief.", "tools": "", "conversations": [ASKED, REPLIED]},
        [("system", "Be brief."), ("user", "Why?"), ("assistant", "Because.")],
    ),
    "TRL, standard": ({"prompt": "Why?", "completion": " Clouds."}, [("user", "Why?"), ("assistant", " Clouds.")]),
    "TRL, conversational": (
        {"prompt": [ASKED], "completion": [REPLIED]},
        [("user", "Why?"), ("assistant", "Because.")],
    ),
    "TRL, language modelling": ({"messages": [ASKED, REPLIED]}, [("user", "Why?"), ("assistant", "Because.")]),
    "UltraChat, whose prompt is the first message": (
        {"prompt": "Why?", "prompt_id": "f0", "messages": [ASKED, REPLIED]},
        [("user", "Why?"), ("assistant", "Because.")],
    ),
    "OpenOrca": (
        {"id": "niv.1", "system_prompt": "Be brief.", "question": "Why?", "response": "Clouds."},
        [("system", "Be brief."), ("user", "Why?"), ("assistant", "Clouds.")],
    ),
    "GSM8K": (
        {"question": "2 + 3?", "answer": "It is 2 + 3 = <<2+3=5>>5.\n#### 5"},
        [("user", "2 + 3?"), ("assistant", "It is 2 + 3 = <<2+3=5>>5.\n#### 5")],
    ),
    "a question with a passage": (
        {"question": "Who?", "passage": "Ada wrote it.", "answer": "Ada"},
        [("user", "Who?\n\nAda wrote it."), ("assistant", "Ada")],
    ),
    "MetaMathQA": (
        {"type": "MATH_AnsAug", "query": "2 + 3?", "original_question": "2 + 3?", "response": "5"},
        [("user", "2 + 3?"), ("assistant", "5")],
    ),
    "NuminaMath, whose messages say the same": (
        {
            "source": "olympiads",
            "problem": "2 + 3?",
            "solution": "5",
            "messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}],
        },
        [("user", "2 + 3?"), ("assistant", "5")],
    ),
    "MATH": (
        {"problem": "2 + 3?", "level": "Level 1", "type": "Algebra", "solution": "\\boxed{5}"},
        [("user", "2 + 3?"), ("assistant", "\\boxed{5}")],
    ),
    "FLAN": ({"inputs": "2 + 3?", "targets": "5", "task": "add"}, [("user", "2 + 3?"), ("assistant", "5")]),
}


@pytest.mark.parametrize(("row", "conversation"), AS_WRITTEN.values(), ids=AS_WRITTEN)
def test_a_row_is_read_as_those_mean_it_who_write_it(row, conversation):
    assert turns(row) == conversation


@pytest.mark.parametrize(("row", "conversation"), AS_WRITTEN.values(), ids=AS_WRITTEN)
def test_the_tokens_of_a_row_are_its_exact_prompt_and_its_passage_is_the_users_text(row, conversation):
    tokenizer = tiny.make_tokenizer()
    found = PromptFormat(tokenizer, "Be kind.").row(load_examples([row])[0])
    said = conversation if conversation[0][0] == "system" else [("system", "Be kind."), *conversation]
    text = "".join(f"<s>{role}\n{content}<e>" for role, content in said)
    assert tokenizer.decode(list(found.ids), clean_up_tokenization_spaces=False) == text
    marked = [token for token, is_users in zip(found.ids, found.is_user_text, strict=True) if is_users]
    users = "".join(content for role, content in conversation if role == "user")
    assert tokenizer.decode(marked, clean_up_tokenization_spaces=False) == users


def test_every_form_of_the_table_has_a_row_above():
    rows = [row for row, _ in AS_WRITTEN.values()]
    for form in ROW_FORMS:
        for reply in form.replies or (form.asks,):
            assert any(form.asks in row and reply in row for row in rows) or reply == "response", form


@pytest.mark.parametrize(("row", "conversation"), AS_WRITTEN.values(), ids=AS_WRITTEN)
def test_the_letter_case_of_a_field_does_not_count(row, conversation):
    assert turns({f" {name.title()}": value for name, value in row.items()}) == conversation
    row = {"Messages": [{"ROLE": "user", "Content": "Why?"}, {"From": "gpt", "VALUE": "So."}]}
    assert turns(row) == [("user", "Why?"), ("assistant", "So.")]
    assert turns(ROW | {"Tools": ["x"]}, ignore_fields="TOOLS") == turns(ROW)
    for twice in (ROW | {"Response": "So."}, {"messages": [ASKED | {"Role": "user"}, REPLIED]}):
        with pytest.raises(CoterieError, match="row 1 of the data.* has R\\w+ twice, in different letter case"):
            load_examples([twice])


@pytest.mark.parametrize("form", ROW_FORMS, ids=lambda form: form.asks)
def test_every_form_takes_each_of_its_replies(form):
    for reply in form.replies:
        assert turns({form.asks: "Why?", reply: "So."}) == [("user", "Why?"), ("assistant", "So.")]
    if not form.replies:
        assert turns({form.asks: [ASKED, REPLIED]}) == [("user", "Why?"), ("assistant", "Because.")]


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in ROLES.items() for name in names])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_a_role_goes_by_all_its_names_in_whatever_letter_case(role, name, keys, field):
    said = [dict(zip(keys, turn, strict=True)) for turn in [(name.title(), "One."), ("user", "Why?"), ("gpt", "So.")]]
    assert turns({field: said})[0] == (role, "One.")


def test_the_answer_of_a_question_is_its_label_too_and_gsm8k_marks_the_short_one():
    rows = [
        {"question": "2 + 3?", "answer": "2 + 3 = 5, so\n#### 5\n"},
        {"question": "2 + 3?", "answer": 5},
        {"question": "2 + 3?", "response": "It is 5.", "answer": "5"},
        {"question": "How?", "answer": "#### Plan\nFirst one, then two."},
    ]
    found = load_examples(rows)
    assert [one.answer for one in found] == ["5", "5", "5", "#### Plan\nFirst one, then two."]
    assert [one.response for one in found][:3] == ["2 + 3 = 5, so\n#### 5\n", "5", "It is 5."]


# --------------------------------------------------------------------------------------------------------- template


@pytest.mark.parametrize("field", PASSAGES)
@pytest.mark.parametrize("asks", [form.asks for form in ROW_FORMS if form.replies])
def test_a_passage_joins_every_kind_of_question_by_the_template(field, asks):
    reply = next(form.replies[0] for form in ROW_FORMS if form.asks == asks)
    row = {asks: "Who {input}?", field: "{instruction} Ada", reply: "Ada."}
    assert turns(row)[0] == ("user", "Who {input}?\n\n{instruction} Ada")  # what looks like a template in a text stays
    assert turns(row, input_template=r"{input}\nQ: {instruction}")[0] == ("user", "{instruction} Ada\nQ: Who {input}?")
    assert turns(row, input_template="{input}\n{instruction}")[0] == ("user", "{instruction} Ada\nWho {input}?")


@pytest.mark.parametrize("template", ["", "{instruction}", "{input}", "{instruction}{input}{input}"])
def test_a_template_that_would_lose_a_part_is_refused(template):
    with pytest.raises(CoterieError, match="--input-template: write {instruction} and {input} into it, each once"):
        from_flat(ReadingSettings, {"input_template": template})


def test_prompts_are_joined_as_the_mixture_was_fitted_unless_said_otherwise(tmp_path):
    (tmp_path / "mixture.json").write_text(json.dumps({"input_template": "{input}: {instruction}"}))
    fitted = reading_for(tmp_path, from_flat(ReadingSettings, {"ignore_fields": "tools"}))
    assert (fitted.template, fitted.ignored) == ("{input}: {instruction}", {"tools"})
    asked = from_flat(ReadingSettings, {"input_template": "{instruction} {input}"})
    assert reading_for(tmp_path, asked) == asked
    (tmp_path / "mixture.json").write_text("{}")  # of before there was a template
    assert reading_for(tmp_path, ReadingSettings()).template == INPUT_TEMPLATE.replace(r"\n", "\n")
    (tmp_path / "mixture.json").write_text('{"input_template": ["x"]}')
    with pytest.raises(CoterieError, match="--input-template"):
        reading_for(tmp_path, ReadingSettings())


# ---------------------------------------------------------------------------------------------------- nothing is lost

UNKNOWN = [name for names in REFUSED.values() for name in names]

PUBLIC_ROWS = {
    # data set: (a row that would lose the field in silence, the field)
    "Natural Instructions": ({"definition": "Translate.", "inputs": "dog", "targets": "chien"}, "definition"),
    "medical-o1": ({"Question": "Why?", "Complex_CoT": "Hm ...", "Response": "Clouds."}, "complex_cot"),
    "SciQ": ({"question": "Why?", "support": "Clouds rain.", "correct_answer": "clouds"}, "support"),
    "WikiTableQuestions": ({"question": "Who?", "table": {"rows": [["Ada"]]}, "answers": ["Ada"]}, "table"),
    "TAT-QA": ({"question": "Why?", "paragraphs": ["Clouds rain."], "answer": "clouds"}, "paragraphs"),
    "AQuA": ({"question": "Why?", "rationale": "Clouds rain.", "answer": "clouds"}, "rationale"),
    "ms-swift": ({"query": "Why?", "response": "Clouds.", "rejected_response": "Sun."}, "rejected_response"),
}


@pytest.mark.parametrize("row, field", PUBLIC_ROWS.values(), ids=PUBLIC_ROWS)
def test_a_public_row_loses_nothing_in_silence(row, field):
    with pytest.raises(CoterieError, match=f"has {field}, which would change the prompt or the loss"):
        load_examples([row], need_response=False)


def test_what_a_row_lacks_is_told_beside_what_it_has():
    with pytest.raises(
        CoterieError,
        match="row 1 of the data has no response among query, answer; rows have .*; a column of another name: --map",
    ):
        load_examples([{"query": "Why?", "answer": "Clouds."}])
    for name, value in {"answers": {"text": ["x"]}, "tests": ["x"], "context": ["x"]}.items():
        with pytest.raises(CoterieError, match=f"{name} must be .* --ignore-fields {name}$"):
            load_examples([ROW | {name: value}])


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_field_that_is_not_understood_is_refused_by_name_unless_passed_over(name):
    for value in ("x", ["x"], {"x": 1}, 0, 0.5, True) if name not in WEIGHTS else ("x", 0, 0.5):
        with pytest.raises(CoterieError, match=f"row 1 of the data has {name}, which .* --ignore-fields {name}$"):
            load_examples([ROW | {name: value}])
        assert turns(ROW | {name: value}, ignore_fields=f"other, {name}") == turns(ROW)
    for nothing in (None, float("nan"), "", " ", [], {}):
        assert turns(ROW | {name: nothing}) == turns(ROW)


@pytest.mark.parametrize("name", [*UNKNOWN, *REFUSED_IN_MESSAGES])
@pytest.mark.parametrize("field", ["messages", "conversations", "completion"])
def test_a_field_of_a_message_is_refused_by_name_too(name, field):
    row = {field: [ASKED, REPLIED | {name: [0]}], **({"prompt": [ASKED]} if field == "completion" else {})}
    with pytest.raises(CoterieError, match=f"row 1 of the data: message 2 has {name}, .* --ignore-fields {name}$"):
        load_examples([row])
    assert turns(row, ignore_fields=name)[-1] == ("assistant", "Because.")


def test_several_fields_are_told_at_once():
    with pytest.raises(CoterieError, match="has tools, choices, which .* --ignore-fields tools,choices$"):
        load_examples([ROW | {"tools": ["x"], "choices": ["x"]}])


def test_a_weight_of_one_changes_nothing_and_neither_does_none_on_a_question():
    for weight in (1, 1.0):
        assert turns(ROW | {"weight": weight}) == turns(ROW)
    assert turns({"messages": [ASKED | {"weight": 0}, REPLIED | {"weight": 1}]}) == turns(ROW)
    with pytest.raises(CoterieError, match="message 2 has weight, which"):
        load_examples([{"messages": [ASKED, REPLIED | {"weight": 0}]}])


@pytest.mark.parametrize("role", ["tool", "function", "function_call", "observation", "developer", "", None, 7])
def test_a_role_that_is_not_understood_is_refused(role):
    with pytest.raises(CoterieError, match="row 1 of the data: every message needs a role .*; message 1 has the role"):
        load_examples([{"messages": [{"role": role, "content": "x"}, ASKED, REPLIED]}])


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        (ROW | {"output": "Otherwise."}, "output"),
        (ROW | {"question": "Who?"}, "question"),
        (ROW | {"text": "Because. It rained."}, "text"),  # a passage, and not the row as another tool writes it
        ({"messages": [ASKED, REPLIED], "text": "Why? So."}, "text"),
        (ROW | {"prompt": "Who?", "completion": "Ada."}, "prompt, completion"),
        (ROW | {"input": "a", "context": "b"}, "context"),
        (ROW | {"system": "a", "system_prompt": "b"}, "system_prompt"),
        ({"messages": [ASKED, REPLIED], "instruction": "Who?"}, "instruction"),
        ({"messages": [ASKED, REPLIED], "conversations": [ASKED, REPLIED]}, "conversations"),
        ({"messages": [ASKED, REPLIED], "context": "Ada wrote it."}, "context"),
        ({"prompt": [ASKED], "completion": "So.", "input": "x"}, "input"),
    ],
)
def test_fields_of_two_forms_are_refused_by_name_and_not_guessed(row, lost):
    with pytest.raises(CoterieError, match=f"and {lost}, which do not belong together .* --ignore-fields") as caught:
        load_examples([row])
    assert turns(row, ignore_fields=str(caught.value).rpartition(" ")[2])


def test_an_input_without_its_instruction_is_refused():
    with pytest.raises(CoterieError, match="row 1 of the data has an empty prompt"):
        load_examples([{"instruction": " ", "input": "1 and 2", "output": "3"}])


def test_a_second_system_prompt_is_refused():
    system = {"role": "system", "content": "a"}
    assert turns({"system": "a", "messages": [system, ASKED, REPLIED]}) == turns({"messages": [system, ASKED, REPLIED]})
    with pytest.raises(CoterieError, match="has two system prompts; pass over one with --ignore-fields system"):
        load_examples([{"system": "a", "messages": [{"role": "system", "content": "b"}, ASKED, REPLIED]}])


@pytest.mark.parametrize(
    "history", [["And?", "So."], [["And?"]], [["And?", None]], "And?", {"And?": "So."}, [{"role": "user"}], 7]
)
def test_a_history_that_is_no_list_of_pairs_is_refused(history):
    with pytest.raises(CoterieError, match="history must be a list of at most 1000 pairs"):
        load_examples([ROW | {"history": history}])


@pytest.mark.parametrize("name", [*PASSAGES, *SYSTEM_PROMPTS])
def test_a_passage_or_a_system_prompt_that_is_no_text_is_refused(name):
    with pytest.raises(CoterieError, match=f"{name} must be a text, but is a list"):
        load_examples([ROW | {name: ["x"]}])


words = st.text("abc ", max_size=3)
fields = st.sampled_from([*sorted(SPOKEN), *sorted(SPOKEN), *LABELS[:4], *UNKNOWN, "level"])


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(fields, words, max_size=6))
@example({"instruction": "a", "response": "b", "context": "c"})
def test_no_known_field_is_lost_in_silence(row):
    """Either a row is refused in one line, or every known text of it stands in the example."""
    try:
        [found] = load_examples([row], need_response=False)
    except CoterieError as error:
        assert "\n" not in str(error)
        return
    said = [message.content for message in found.messages]
    for name, text in row.items():
        if name == RENDERED:  # another tool's prompt, so the text stands in the row again
            asked = any(row[form.asks].strip() in text for form in ROW_FORMS if form.asks in row)
            assert text.strip() in (*map(str.strip, said), "") or (asked and (found.response or "").strip() in text)
        elif name in SPOKEN:
            assert any(text.strip() in content for content in said), name
        elif name in LABELS:
            assert getattr(found, name) == text
        assert name not in UNKNOWN or not text.strip()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields | st.sampled_from(["role", "from"]), inner),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(fields | st.sampled_from([HISTORY, "answers", "tests"]), values, max_size=4))
@example(ROW | {"id": 10**400, "weight": 10**400})
@example(ROW | {"answer": np.float32("nan"), "weight": np.ones(2)})
def test_whatever_a_row_holds_it_is_read_or_refused_in_one_line(row):
    try:
        [found] = load_examples([ROW | row])
    except CoterieError as error:
        assert "\n" not in str(error) and str(error).startswith("row 1 of the data")
    else:
        assert all(isinstance(message.content, str) for message in found.messages)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(["from", "role"]), st.sampled_from(["gpt", "human", "tool"]), words), max_size=4)
)
def test_no_turn_is_lost_in_silence(said):
    row = {"conversations": [{key: role, "value": text} for key, role, text in said]}
    try:
        [found] = load_examples([row], need_response=False)
    except CoterieError:
        return
    assert [message.content for message in found.messages] == [text for _, _, text in said]


# ------------------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("name", ["id", "source", "category", "answer"])
def test_a_label_is_a_text_or_a_number_and_all_else_is_refused_by_row_and_field(name):
    for value, text in ((7, "7"), (0.5, "0.5"), ("x", "x"), ("", "")):
        assert getattr(load_examples([ROW | {name: value}])[0], name) == text
    for missing in (None, float("nan")):
        assert load_examples([ROW | {name: missing}]) == load_examples([ROW])
    for value in ([], ["x"], {}, {"x": 1}, True, False, float("inf"), b"x"):
        with pytest.raises(
            CoterieError, match=f"row 2 of the data: {name} must be a text or a number, but is .* --ignore"
        ):
            load_examples([ROW, ROW | {name: value}])
        assert load_examples([ROW | {name: value}], reading=ReadingSettings(ignore_fields=name)) == load_examples([ROW])


def test_jsons_nan_is_missing_everywhere(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"instruction": "Why?", "input": NaN, "response": "Because.", "answer": NaN, "tools": NaN, "answers": NaN}'
    )
    assert load_examples(file) == load_examples([ROW])


# ------------------------------------------------------------------------------------- copies and leaks behind unicode

NFC, NFD = "Où est le café naïve d'Åse?", unicodedata.normalize("NFD", "Où est le café naïve d'Åse?")
DISGUISES = {
    "NFD": NFD,
    "zero-width space": NFC.replace("caf", "ca\u200bf"),
    "zero-width joiner": NFC.replace("caf", "c\u200daf"),
    "soft hyphen": NFC.replace("caf", "ca\u00adf"),
    "byte order mark": "\ufeff" + NFC,
    "variation selector": NFC + "\ufe0f",
    "letter case": NFC.upper(),
    "white space": NFC.replace(" ", "\u00a0 \n"),
}


def one(question: str, response: str = "Là-bas.", **others: str) -> Example:
    return load_examples([{"instruction": question, "response": response, **others}])[0]


@pytest.mark.parametrize("text", DISGUISES.values(), ids=DISGUISES)
def test_the_writing_of_characters_hides_no_leak(text):
    asked = one(text)
    assert question_of(asked) == question_of(one(NFC))
    assert asked.instruction == text  # the text itself stays as it is
    assert index_pools({"p": [asked]}, None, [], [one(NFC)]).kinds.tolist() == [EXCLUDED_QUESTION]
    shown = with_shots([one(NFC, id="a")], [one(text, id="b")], count=1, length=lambda row: 1, longest=9)
    assert shown[0].kept == 0


@pytest.mark.parametrize("name", ["NFD", "zero-width space", "zero-width joiner", "soft hyphen", "byte order mark"])
def test_the_writing_of_characters_hides_no_copy(name):
    index = index_pools({"p": [one(NFC), one(DISGUISES[name])]}, None, [], [])
    assert sorted(index.kinds.tolist()) == [0, COPY]


@few
@given(st.text(max_size=8), st.sampled_from("\u200b\u200c\u200d\u2060\ufeff\u00ad\ufe0f"), st.integers(0, 8))
def test_questions_in_any_form_are_the_same(text, invisible, place):
    asked = f"Q {text}"
    for other in (unicodedata.normalize("NFD", asked), unicodedata.normalize("NFC", asked)):
        found = one(other[:place] + invisible + other[place:])
        assert question_of(found) == question_of(one(asked))
        assert text_of(found) == text_of(one(asked))


def test_keys_of_texts_without_disguise_are_those_of_before():
    """Banks keep keys of the questions that adapters were trained on."""
    assert question_of(one("  Is  ÉCOLE\tstraße \u2460 x² ﬁne? ")) == "is école strasse \u2460 x² fine?"


def test_rows_that_differ_in_their_passage_only_are_no_copies_and_no_leaks():
    rows = load_examples([{"instruction": "Summarise.", "context": text, "response": "It rains."} for text in "abb"])
    assert sorted(index_pools({"p": rows}, None, [], []).kinds.tolist()) == [0, 0, COPY]
    assert index_pools({"p": rows[:1]}, None, [], rows[1:]).kinds.tolist() == [0]
    assert len({question_of(row) for row in rows}) == len({text_of(row) for row in rows}) == 2  # leaks and embeddings
    assert hash_examples(rows[:1]) != hash_examples(rows[1:2])


# ------------------------------------------------------------------------------------------------------------- files


def packed(rows: list[dict], ending: str, folder: Path) -> str:
    """Write rows in the kind of file that an ending names."""
    kind = ending.lower().removesuffix(".gz")
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), folder / "raw")
        data = (folder / "raw").read_bytes()
    elif kind == ".csv":
        quoted = [",".join('"' + (value or "").replace('"', '""') + '"' for value in row.values()) for row in rows]
        data = "\r\n".join([",".join(rows[0]), *quoted, ""]).encode("utf-8-sig")
    elif kind == ".json":
        data = json.dumps(rows, indent=2).encode()
    else:
        data = "\n".join([*lines, ""]).encode()
    path = folder / f"rows{ending}"
    path.write_bytes(gzip.compress(data) if ending.lower().endswith(".gz") else data)
    return str(path)


ENDINGS = [".jsonl", ".ndjson", ".json", ".csv", ".parquet"]
ROWS = [
    {"instruction": 'Say "a, b"\nand é.', "input": "x", "output": "a, b", "answer": "042"},
    {"instruction": "Why?", "input": None, "output": " Because. ", "answer": None},
]


@pytest.mark.parametrize("ending", [*ENDINGS, ".JSONL", ".Csv", ".PARQUET", ".jsonl.gz", ".json.gz", ".csv.GZ"])
def test_every_kind_of_file_gives_the_same_examples(ending, tmp_path):
    found = load_examples(packed(ROWS, ending, tmp_path))
    assert found == load_examples(ROWS)
    assert [example.answer for example in found] == ["042", None]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": "d"}\n', 2),
        ('{"prompt": "a",\n "completion": "b"} {"prompt": "c", "completion": "d"}', 2),
        ('\ufeff [ {"prompt": "a", "completion": "b"}\n,\n{"prompt": "c", "completion": "d"} ] \n', 2),
        ('{\n  "prompt": "a",\n  "completion": "b"\n}\n', 1),
    ],
    ids=["lines", "one after the other", "an array", "one object"],
)
def test_a_json_file_is_an_array_or_objects_one_after_the_other(text, count, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    assert len(load_examples(tmp_path / "rows.json")) == count


@few
@given(st.lists(st.fixed_dictionaries({"prompt": st.text(min_size=1).filter(str.strip)}), min_size=1, max_size=5))
def test_a_json_array_read_in_small_blocks_is_what_json_reads_at_once(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("json") / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", 1)
        assert [row for _, row in files.rows_of(path, None)] == json.loads(path.read_text(encoding="utf-8"))


BROKEN = {
    # name: (ending, text, message)
    "array that is cut off": (".json", '[{"prompt": "a"},', "is cut off or goes on after its 1 rows"),
    "object that is cut off": (".json", '[{"prompt": "a"', "row 1 is not valid JSON"),
    "array that goes on": (".json", '[{"prompt": "a"}] x', "is cut off or goes on after its 1 rows"),
    "no comma": (".json", '[{"prompt": "a"} {"prompt": "a"}]', "row 1 is not followed by a comma"),
    "array of texts": (".json", '["a"]', "row 1 is not an object"),
    "a text": (".json", '"a"', "row 1 is not an object"),
    "no UTF-8": (".json", b'[{"prompt": "caf\xe9"}]', "cannot be read .*0xe9"),
    "a name twice": (
        ".jsonl",
        '{"prompt": "a", "prompt": "b"}',
        "line 1 is not valid JSON .the field 'prompt'",
    ),
    "a name twice in an array": (
        ".json",
        '[{"prompt": "a", "prompt": "b"}]',
        "row 1 is not valid JSON .the field 'prompt'",
    ),
    "deep line": (".jsonl", '{"tests": ' + "[" * 100_000, "line 1 is nested too deeply"),
    "deep row": (".json", '[{"tests": ' + "[" * 100_000, "row 1 is nested too deeply"),
    "deep tests": (
        ".jsonl",
        '{"prompt": "a", "completion": "b", "tests": {"a": ' + "[" * 200 + "]" * 200 + "}}",
        "tests must hold plain JSON .nested more than 100 deep",
    ),
    "a cell too many": (".csv", "prompt,completion\na,b,c\n", "row 1 has 3 cells, but there are 2 columns"),
    "a cell too few": (".csv", "prompt,completion\na,b\na\n", "row 2 has 1 cells, but there are 2 columns"),
    "semicolons": (".csv", "prompt;response\na;b\n", "parts its cells by ';'; save it with commas"),
    "a column twice": (".csv", "prompt,prompt\na,b\n", "has two columns of one name"),
    "an open quote": (".csv", 'prompt,completion\n"a,b\nc,d\n', "cannot be read .*; mend the file"),
    "Latin-1": (".csv", "prompt,completion\ncaf\xe9,b\n".encode("latin-1"), "cannot be read .*0xe9"),
    "no Parquet": (".parquet", "prompt", "is no Parquet file that can be read"),
    "no gzip": (".jsonl.gz", "{}", "cannot be read .Not a gzipped file"),
    "gzip that is cut off": (
        ".jsonl.gz",
        gzip.compress(b'{"prompt": "a"}')[:-9],
        "cannot be read .Compressed",
    ),
    "nothing": (".json", "", "holds no examples"),
    "nothing but names": (".csv", "prompt,completion\n", "holds no examples"),
}


@pytest.mark.parametrize(("ending", "text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_told_in_one_line(ending, text, message, tmp_path):
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"rows{ending}"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(CoterieError, match=message) as caught:
        load_examples(path, need_response=False)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(CoterieError, match=r"type: pip install 'coterie\[data\]'"):
        load_examples(tmp_path / "rows.parquet")


def test_a_row_in_memory_that_is_no_object_is_told():
    with pytest.raises(CoterieError, match="row 2 of the data holds a str, not an object"):
        load_examples(iter([ROW, "Why?"]))


# ------------------------------------------------------------------------------------------------------------ bounds


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".jsonl.gz"])
def test_a_row_that_is_too_long_is_refused_before_it_is_held(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 2**20)  # as 64 MiB would be, in less time
    start = {".json": '[{"prompt": "', ".csv": 'prompt,completion\n"'}.get(ending, '{"prompt": "')
    data = start.encode() + b"x" * (16 * 2**20)
    path = tmp_path / f"rows{ending}"
    path.write_bytes(gzip.compress(data, 1) if ending.endswith(".gz") else data)
    tracemalloc.start()
    with pytest.raises(CoterieError, match=r"rows\.\S+, (line|row) \d is longer than 1 MiB"):
        load_examples(path)
    assert tracemalloc.get_traced_memory()[1] < 8 * files.MAX_ROW_BYTES
    tracemalloc.stop()


def test_the_longest_conversation_can_be_written_and_read_again(tmp_path):
    row = {"prompt": "\U0001f600" * (MAX_CHARACTERS - 1), "completion": "x"}
    assert len(load_examples(written(tmp_path / "rows.jsonl", row))[0].instruction) == MAX_CHARACTERS - 1


def test_a_conversation_that_is_too_long_is_refused():
    with pytest.raises(CoterieError, match="has more than 4194304 characters of text; split or delete the row"):
        load_examples([ROW | {"context": "x" * MAX_CHARACTERS}])


@pytest.mark.parametrize("row", [{"messages": [ASKED, REPLIED] * 50_000}, ROW | {HISTORY: [["a", "b"]] * 100_000}])
def test_a_conversation_of_too_many_turns_is_refused(row):
    with pytest.raises(CoterieError, match=f"{MAX_MESSAGES}"):
        load_examples([row])


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_the_limit_stops_the_reading_itself(ending, tmp_path, monkeypatch):
    path = Path(packed([ROW | {"id": str(n)} for n in range(20_000)], ending, tmp_path))
    read = []
    real = files.READERS[ending]
    monkeypatch.setitem(files.READERS, ending, lambda file, name: counted(real(file, name), read))
    assert [example.id for example in load_all([str(path)], limit=6)] == [str(n) for n in range(6)]
    assert len(read) == 6
    if ending != ".parquet":  # what cannot be read stands beyond the limit
        path.write_bytes(path.read_bytes()[:-9] + b"\xff")
        assert len(load_examples(path, limit=6)) == 6


def counted(rows: Iterator, read: list) -> Iterator:
    for row in rows:
        read.append(row)
        yield row


def test_of_a_hub_data_set_no_more_is_got_than_the_limit_says(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, **how: object) -> Iterator[dict]:
        asked.append((name, how["split"], how["streaming"]))
        return (ROW | {"id": number} for number in range(9))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [len(load_examples(name, n)) for name, n in (("a/b", 6), ("a/b:test", None), ("a/b:train[:9]", 6))] == [
        6,
        9,
        6,
    ]
    assert asked == [("a/b", "train", True), ("a/b", "test", False), ("a/b", "train[:9]", False)]


@pytest.mark.parametrize("limit", [None, 1])
def test_arrow_files_are_read_as_streams_and_as_files(limit, tmp_path, monkeypatch):
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = pyarrow.Table.from_pylist([ROW, ROW])
    for name, kind in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        with kind(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
        assert len(load_examples(tmp_path / f"{name}.arrow", limit)) == (limit or 2)


def test_rows_in_memory_are_not_asked_for_beyond_the_limit():
    endless = (ROW | {"id": number} for number in iter(int, 1))
    assert len(load_examples(endless, limit=6)) == 6
    assert len(list(islice(read_all([iter([ROW] * 9)]), 3))) == 3


# ------------------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not on this machine")
@pytest.mark.parametrize("file", sorted(SHARED.glob("*/*.jsonl")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_real_data_sets_read_as_before(file):
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 200)]
    found = load_examples(file, limit=200)
    assert [(e.instruction, e.response, e.answer) for e in found] == [
        (row["instruction"], row["response"], row["answer"]) for row in rows
    ]


# --------------------------------------------------------------------------------------------------------- the page

PAGE = (Path(__file__).parents[1] / "docs" / "inputs.md").read_text().partition("\n## Rows\n")[2].partition("\n## ")[0]


def table_of_page(head: str) -> list[list[str]]:
    """The cells of a table of the page, by how its first line begins."""
    body = PAGE.partition(f"| {head} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()[2:]]


def test_the_page_on_inputs_lists_what_the_tables_of_the_code_hold():
    def names(*fields: str) -> str:
        return ", ".join(f"`{name}`" for name in fields)

    assert table_of_page("asks") == [[names(one.asks), names(*one.replies), one.known_from] for one in ROW_FORMS]
    assert table_of_page("what") == [[what, names(*fields)] for what, fields in REFUSED.items()]
    told = " ".join(PAGE.split())
    assert f"Roles: {'; '.join(names(*own) for own in ROLES.values())}." in told
    assert f"a passage ({names(*PASSAGES)})" in told and f"a system prompt ({names(*SYSTEM_PROMPTS)})" in told
    assert all(f"`{name}`" in told for name in (*LABELS, *REFUSED_IN_MESSAGES, HISTORY, RENDERED, *files.READERS))
    assert f"`{INPUT_TEMPLATE}`" in told
    bounds = f"{files.MAX_ROW_BYTES >> 20} MiB in its file and {MAX_CHARACTERS:,} characters of conversation"
    assert f"{bounds} in at most {MAX_MESSAGES:,} messages, and its tests are nested at most {MAX_DEPTH} deep" in told
