"""Files that may come from a stranger: whatever they are, they are read within bounds, or refused in one line."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.artifacts.reading import MAX_DEPTH, open_regular, parse_json, parse_yaml, read_lines, read_text
from coterie.cli.table import echo
from coterie.errors import LONGEST_ERROR, CoterieError, shown
from coterie.records.wording import columns

texts = st.text(max_size=8)
numbers = st.integers(-(2**64), 2**64) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
LOOKED_FOR = "\x1b[2J\x9b31m\r\n\x07\u202e\u2028\ud800"


def refusal(read, *arguments, **options) -> str:
    with pytest.raises(CoterieError) as error:
        read(*arguments, **options)
    told = str(error.value)
    assert told == shown(told) and len(told.splitlines()) == 1
    return told


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_pipes_folders_and_devices_are_neither_waited_for_nor_read(make, tmp_path):
    path = tmp_path / "x.json"
    make(path)
    for read in (open_regular, read_text, lambda path: list(read_lines(path))):
        assert re.search(r"x\.json is (not a regular file|a folder, not a file);", refusal(read, path))


def test_a_file_and_a_line_are_read_up_to_their_limit(tmp_path):
    path = tmp_path / "x"
    path.write_text("é" * 5)
    assert read_text(path, 10) == "é" * 5
    assert "x has more than the 9 bytes that are accepted" in refusal(read_text, path, 9)
    path.write_text("abc\n\nabcdef\n")
    assert list(read_lines(path, 7)) == [(1, "abc\n"), (3, "abcdef\n")]
    assert "x, line 3 has more than the 6 bytes" in refusal(lambda: list(read_lines(path, 6)))


def test_a_name_that_no_file_can_have_is_refused():
    assert "null byte" in refusal(read_text, Path("a\0b"))
    assert "too long" in refusal(read_text, Path("a" * 300))


# ---------------------------------------------------------------------------------------------------------------- JSON


@settings(deadline=None, max_examples=50)
@given(value=values)
def test_what_json_and_yaml_can_say_comes_back_as_it_was(value):
    assert parse_json(json.dumps(value), "x") == value
    assert parse_yaml(yaml.safe_dump(json.loads(json.dumps(value))), "x") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NaN", "NaN is no number that JSON has"),
        ("[-Infinity]", "-Infinity is no number that JSON has"),
        ('{"a": 1e999}', "x holds a number that is not finite"),
        (str(2**64 + 1), "x holds a number that is too large"),
        ("9" * 5000, "x is not readable JSON"),
        ('"\\ud800"', "a text holds half a character"),
        ('{"\\udfff": 1}', "a text holds half a character"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "x is too deeply nested"),
        ("[" * 1000 + "]" * 1000, "x is too deeply nested"),
        ('{"a":' * 100_000, "x is too deeply nested"),
        ("", "x is not readable JSON"),
    ],
)
def test_json_that_would_surprise_later_is_refused(text, message):
    assert message in refusal(parse_json, text, "x")


def test_json_as_deep_as_allowed_is_read():
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_json(text, "x")) == text


# ---------------------------------------------------------------------------------------------------------------- YAML


def bomb(reference: str) -> str:
    """Nine levels that each name the one above nine times: a billion values."""
    levels = [
        f"{name}: &{name} [{', '.join([reference.format(above)] * 9)}]"
        for above, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    return "\n".join(["a: &a [lol]", *levels])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb("*{}"), "x, line 1 is not readable YAML (anchors and aliases are not read)"),
        ("a: &a {b: 1}\nc: {<<: *a}", "anchors and aliases are not read"),
        ("a: {<<: {b: 1}}", "a key must be a text that stands once in its object"),
        ("a: 1\nb: 2\na: 3", "x, line 3 is not readable YAML (a key must be a text that stands once"),
        ("? [a, b]\n: 1", "a key must be a text"),
        ("1: a", "x holds a key that is no text"),
        ("a: !!binary aGk=", "tags are not read"),
        ("!!python/object/apply:os.system [id]", "tags are not read"),
        ("a: 2024-01-02", "x holds '2024-01-02', which is no text; put it in quotes"),
        ("a: 9999-99-99", "x is not readable YAML"),
        ("a: .inf", "x holds a number that is not finite"),
        ("a: " + "9" * 5000, "x is not readable YAML"),
        ("[" * 1000, "it is too deeply nested"),
        ("[" * 100_000, "it is too deeply nested"),
        ("- " * 1000 + "a", "it is too deeply nested"),
        ("a: \x1b[2J", "x is not readable YAML"),
    ],
)
def test_yaml_that_grows_runs_or_hides_is_refused_at_once(text, message):
    told = refusal(parse_yaml, text, "x")
    assert message in told and len(told) < 300


# ------------------------------------------------------------------------------------------------------ what is shown


@given(text=st.text())
def test_what_is_shown_is_the_same_text_to_json_and_acts_on_no_terminal(text):
    assert json.loads(shown(json.dumps(text, ensure_ascii=False))) == text
    assert not set(shown(text + LOOKED_FOR)) & set(LOOKED_FOR.replace("[2J", "").replace("31m", ""))


def test_letters_of_all_scripts_are_shown_as_they_are():
    for text in ("naïve 漢字 עברית 👩\u200d👧", "می\u200cخواهم", "a\u00a0b\u00adc"):
        assert shown(text) == text


def test_an_error_is_one_line_of_bounded_length_whatever_it_quotes():
    told = str(CoterieError(f"no expert is called {LOOKED_FOR}{'x' * 10_000}; type:\n  coterie --help\n"))
    assert told == shown(told) and len(told.splitlines()) == 1 and len(told) <= 2 * LONGEST_ERROR
    assert told.startswith("no expert is called \\u001b[2J\\u009b31m") and told.endswith("; type: coterie --help")


def test_what_others_wrote_is_printed_without_effect(capsys):
    """Markup is text; what acts on a terminal is escaped, in JSON so that it says the same."""
    name = "[bold]x[/bold]\x1b[2J\x9b1m\u202e"
    echo(columns([("name", "n"), (name, "1")], "<>"))
    echo(json.dumps({"text": name}, ensure_ascii=False))
    table, line = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert "[bold]x[/bold]\\u001b[2J\\u009b1m\\u202e" in table
    assert json.loads(line) == {"text": name} and shown(line) == line
