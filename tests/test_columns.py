"""Columns of any name: `--map response=output --map answers=answers.text`, in every kind of file and every command."""

import csv
import json
import logging

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml

import tiny
from conftest import FIT, write_rows
from coterie.data.columns import FIELDS
from coterie.data.examples import load_all, load_examples
from coterie.data.forms import LABELS, PASSAGES, ROW_FORMS
from coterie.data.streaming import index_pools, stream_examples
from coterie.errors import CoterieError
from coterie.mixture import Mixture
from coterie.mixture.folder import reading_for
from coterie.settings.commands import EvaluationSettings
from coterie.settings.reading import checked
from coterie.settings.rows import ReadingSettings
from helpers import refused, table

PUBLISHED = table(
    # as the files of these sets have them: the row, the map, and question, response, answer, answers
    (
        "SQuAD",
        {"question": "Who?", "context": "Ada.", "answers": {"text": ["Ada", "Ada L."], "answer_start": [0, 0]}},
        {"answers": "answers.text", "response": "answers.text.0"},
        ("Who?\n\nAda.", "Ada", None, ("Ada", "Ada L.")),
    ),
    (
        "SQuAD in rows",
        {"question": "Who?", "context": "Ada.", "answers": [{"text": "Ada", "answer_start": 0}]},
        {"answers": "answers.text", "response": "answers.text.0"},
        ("Who?\n\nAda.", "Ada", None, ("Ada",)),
    ),
    (
        "TriviaQA",
        {"question": "Who?", "answer": {"value": "Ada", "aliases": ["Ada", "Countess"]}},
        {"answer": "answer.value", "answers": "answer.aliases"},
        ("Who?", "Ada", "Ada", ("Ada", "Countess")),
    ),
    (
        "SciQ",
        {"question": "Why?", "support": "Clouds.", "correct_answer": "rain"},
        {"context": "support", "answer": "correct_answer"},
        ("Why?\n\nClouds.", "rain", "rain", ()),
    ),
    (
        "SAMSum",
        {"id": "1", "dialogue": "A: hi", "summary": "Hi."},
        {"prompt": "dialogue", "response": "summary"},
        ("A: hi", "Hi.", None, ()),
    ),
    (
        "WMT",
        {"translation": {"de": "Hund", "en": "dog"}},
        {"prompt": "translation.de", "response": "translation.en"},
        ("Hund", "dog", None, ()),
    ),
    ("emotion", {"text": "I cry", "label": 0}, {"question": "text", "answer": "label"}, ("I cry", "0", "0", ())),
    (
        "medical-o1",
        {"Question": "Why?", "Complex_CoT": "Hm.", "Response": "Rain."},
        {"response": "Complex_CoT", "answer": "Response"},
        ("Why?", "Hm.", "Rain.", ()),
    ),
    (
        "AQuA",
        {"question": "Why?", "rationale": "Clouds.", "correct": "A"},
        {"response": "rationale", "answer": "correct"},
        ("Why?", "Clouds.", "A", ()),
    ),
    ("APPS", {"problem": "Sum.", "solutions": ["x", "y"]}, {"solution": "solutions.1"}, ("Sum.", "y", None, ())),
    (
        "CommonsenseQA",
        {"question": {"stem": "Why?"}, "answerKey": "A"},
        {"question": "question.stem", "answer": "answerKey"},
        ("Why?", "A", "A", ()),
    ),
)

ROWS = [{"Frage": "Why?", "Antwort": "Rain.", "Nr.": "a"}, {"Frage": "Who?", "Antwort": "Ada.", "Nr.": "b"}]
MAP = ["question=frage", "response=Antwort", "id=nr."]


def told(*sources, **how: object) -> str:
    with pytest.raises(CoterieError) as caught:
        load_examples(*sources, **how)
    return str(caught.value)


@pytest.mark.parametrize("row, columns, wanted", PUBLISHED)
def test_rows_of_published_sets_are_read_as_they_are(row, columns, wanted):
    for written in (row, {name.upper(): value for name, value in row.items()}):
        [found] = load_examples([written], map=columns)
        assert (found.instruction, found.response, found.answer, found.answers) == wanted
    told([row])  # which is why they need a map


def test_columns_may_change_places():
    [found] = load_examples(
        [{"instruction": "b", "output": "a"}], map={"instruction": "output", "output": "instruction"}
    )
    assert (found.instruction, found.response) == ("a", "b")


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "json", "disk", "arrow in memory"])
def test_every_kind_of_source_has_its_columns_called_alike(kind, tmp_path):
    file = tmp_path / f"rows.{kind}"
    if kind == "csv":
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    elif kind == "disk":
        datasets.Dataset.from_list(ROWS).save_to_disk(file)
    else:
        file.write_text("\n".join(map(json.dumps, ROWS)))
    source = datasets.Dataset.from_list(ROWS) if kind == "arrow in memory" else file
    found = load_examples(source, map=MAP)
    assert [(one.id, one.instruction, one.response) for one in found] == [("a", "Why?", "Rain."), ("b", "Who?", "Ada.")]


def test_a_field_that_is_mapped_can_be_any_that_rows_have():
    known = {name for form in ROW_FORMS for name in (form.asks, *form.replies)}
    assert known | set(LABELS) | set(PASSAGES) <= set(FIELDS)
    assert told(ROWS, map={"quetsion": "Frage"}).startswith(
        "no field of rows is called 'quetsion'. Did you mean 'quest"
    )


def test_a_column_that_no_row_has_is_told_with_those_that_there_are():
    told_first = told(ROWS, map={"question": "Fage", "response": "Antwort"})
    assert told_first.startswith("--map question=fage: no column is called 'fage'. Did you mean 'Frage'? There are: ")
    assert "row 1 of the data has the fields" in told_first
    rows = [{"question": "Why?", "response": "Rain.", "grade": {"value": 3}}]
    assert told(rows, map={"category": "grade.vlue"}).startswith(
        "the data: --map category=grade.vlue: no column is called 'grade.vlue'. Did you mean 'grade.value'?"
    )
    assert load_examples([*rows, {**rows[0], "kind": "b"}], map={"category": "kind"})[1].category == "b"
    assert load_examples([{**rows[0], "kind": None}], map={"category": "kind"})[0].category is None


def test_a_row_without_a_known_form_names_the_flag():
    assert told(ROWS).endswith("; a column of another name: --map FIELD=COLUMN")
    assert "say with --map FIELD=label what it is" in told([{"question": "a", "answer": "b", "label": 1}])


def test_nothing_is_lost_where_a_row_has_the_field_too():
    row = {"question": "Why?", "response": "No.", "output": "Rain."}
    assert "has response and output, which --map response=output takes for it" in told([row], map="response=output")
    [found] = load_examples([row], map="response=output", ignore_fields="response")
    assert found.response == "Rain."
    assert load_examples([row | {"response": ""}], map="response=output") == [found]


@pytest.mark.parametrize("written", ["response", "response=", "=output", ["a=b", "c"]])
def test_a_map_that_is_none_says_how_it_is_written(written):
    assert "--map: write FIELD=COLUMN, such as response=output" in told(ROWS, map=written)
    assert "response can be one column only" in told(ROWS, map=["response=a", "Response=b"])


def test_of_several_sources_one_has_to_have_a_column(tmp_path, caplog):
    own = {"question": "How?", "response": "So."}
    files = [str(write_rows(tmp_path / name, rows)) for name, rows in (("a.jsonl", ROWS), ("b.jsonl", [own]))]
    reading = ReadingSettings(map=MAP)
    assert [one.response for one in load_all(files, reading=reading)] == ["Rain.", "Ada.", "So."]
    with pytest.raises(CoterieError, match="b.jsonl: --map question=frage"):
        load_all(files[1:], reading=reading)
    with caplog.at_level(logging.INFO, "coterie"):  # open data need not have the columns of the shots
        assert [one.response for one in stream_examples(files[1], reading=reading)] == ["So."]
        assert len(index_pools({file: file for file in files}, None, [], [], reading)) == 3
    assert [line for line in caplog.messages if "b.jsonl is read without --map question=frage" in line]


def test_a_run_keeps_how_its_rows_were_read(model_folder, tmp_path, run):
    rows = [
        {"Frage": row["instruction"], "Antwort": row["response"], "Art": row["source"]} for row in tiny.make_rows(24)
    ]
    file, output = tmp_path / "train.csv", tmp_path / "run"
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    flags = [word for name, value in FIT.items() for word in (f"--{name.replace('_', '-')}", value)]
    fit = ["fit", "elrea", "--model", model_folder, "--data", file, "--output", output, *flags, "--device", "cpu"]
    refused(run(*fit, "--map", "question=Fage"), "--map question=fage: no column .* Did you mean 'Frage'")
    assert not output.exists()
    words = ["--map", "question=Frage", "--map", "response=Antwort", "--map", "source=Art"]
    assert run(*fit, *words)[0] == 0
    assert yaml.safe_load((output / "run.yaml").read_text())["settings"]["reading"]["map"] == words[1::2]
    assert json.loads((output / "mixture.json").read_text())["map"] == words[1::2]
    copied = tmp_path / "copy"
    Mixture.from_pretrained(output, device="cpu").save_pretrained(copied)
    test = write_rows(tmp_path / "test.jsonl", rows[:2])
    own = write_rows(tmp_path / "own.jsonl", [{"instruction": "add 1 2", "response": "3"}])
    out = run("route", copied, "--input", test, "--json")[1]  # as it was fitted, from a saved copy too
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == [row["Frage"] for row in rows[:2]]
    assert run("route", copied, "--input", own, "--json")[0] == 0  # rows with the fields' own names still go
    known = run("eval", output, "--data", test, "--output", tmp_path / "eval", "--methods", "elrea", "--no-generate")
    assert known[0] == 0, known
    kept = yaml.safe_load((tmp_path / "eval" / "run.yaml").read_text())["settings"]
    assert checked(EvaluationSettings, kept).reading == ReadingSettings()
    assert reading_for(output, map="answer=x").columns == {"answer": "x"}  # what is said comes first


@pytest.mark.parametrize("value", ["x", 3, ["x"], [3]])
def test_a_strangers_record_of_columns_is_told_in_one_line(tmp_path, value):
    (tmp_path / "mixture.json").write_text(json.dumps({"map": value}))
    with pytest.raises(CoterieError, match="--map"):
        load_examples(ROWS, reading=reading_for(tmp_path))
