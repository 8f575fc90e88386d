"""Rows that may outgrow memory are read back as they were, one by one."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from conftest import write_rows
from coterie.artifacts import hash_json, hash_json_list
from coterie.data import spooled
from coterie.data.batching import PromptFormat, TokenRow, tokenise
from coterie.data.examples import load_all, load_examples, spool_all
from coterie.data.spooled import Chosen, Spooled
from coterie.errors import CoterieError

TOKENS = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans(), st.booleans()), min_size=1, max_size=6)
every_size = pytest.mark.parametrize("in_memory", [1, 10, 1000], ids=["on disk", "then on disk", "in memory"])


@given(tokens=TOKENS, prompt=st.integers(0, 6), source=st.none() | st.text(st.characters(codec="utf-8"), max_size=4))
def test_a_row_is_read_back_as_it_was_written(tokens, prompt, source):
    ids, answer, asked = zip(*tokens, strict=True)
    row = TokenRow(ids, min(prompt, len(ids)), answer, asked, source)
    assert TokenRow.unpacked(row.packed()) == row


@every_size
def test_items_are_those_of_a_list(in_memory, monkeypatch):
    monkeypatch.setattr(spooled, "IN_MEMORY", in_memory)
    words = ["one", "", "three", "vier", "x" * 40]
    rows = Spooled(str.encode, bytes.decode, words)
    assert (rows[1], rows[-1]) == ("", words[-1])
    rows.append("last")  # after reading, too
    assert list(rows) == [*words, "last"] and len(rows) == 6
    assert (rows[2], rows[1:4], rows[::-2]) == ("three", words[1:4], ["last", "vier", ""])
    with pytest.raises(IndexError):
        rows[6]
    assert isinstance(rows._file.name, int) == (in_memory < 1000)  # the number of an open file without a name


def test_chosen_items_are_made_when_they_are_asked_for():
    asked = []
    chosen = Chosen([10, 20, 30], np.array([2, 0]), lambda item: asked.append(item) or item + 1)
    assert (len(chosen), asked) == (2, [])
    assert (chosen[1], asked) == (11, [10])
    assert (list(chosen), chosen[:1]) == ([31, 11], [31])


def test_examples_are_read_back_as_they_are_loaded(tmp_path):
    rows = tiny.make_rows(5)
    rows[1] |= {"id": "r0", "category": "é", "answers": ["1", "eins"], "tests": {"cases": [[1, None], {"a": 0.5}]}}
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    loaded = load_all([file])
    assert list(spool_all([file])) == loaded
    assert loaded[1].id == "r0#2"
    (tmp_path / "rows.jsonl").write_text("{")
    with pytest.raises(CoterieError, match="line 1 is not valid JSON"):
        spool_all([file])


def test_tokens_are_on_disk_and_not_in_memory(monkeypatch):
    monkeypatch.setattr(spooled, "IN_MEMORY", 1)
    examples, prompts = load_examples(tiny.make_rows(400)), PromptFormat(tiny.make_tokenizer())
    tokenise(prompts, examples[:9], 500)  # what it keeps for itself is made
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = tokenise(prompts, examples, 500)
        taken = tracemalloc.get_traced_memory()[0] - before
        rows = list(kept.rows)
        held = tracemalloc.get_traced_memory()[0] - before - taken
    finally:
        tracemalloc.stop()
    assert len(rows) == 400
    assert taken < held / 3  # what a list would hold


def test_the_hash_of_a_list_is_the_same_one_value_at_a_time():
    values = [{"b": 1, "a": "é"}, {}, {"x": [1, None]}]
    assert hash_json_list(iter(values)) == hash_json(values)
    assert hash_json_list(iter(())) == hash_json([])
