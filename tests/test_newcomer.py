"""A newcomer's first session, slips included: from odd columns and a folder of adapters to an answer and a report."""

import csv
import shlex

import pytest

import tiny
from helpers import refused, save_adapter


@pytest.fixture
def home(tmp_path, monkeypatch, backbone):
    """A folder with two adapters, and questions in columns of the newcomer's own."""
    for seed, name in enumerate(("maths", "law")):
        config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
        save_adapter(backbone.model, tmp_path / "adapters" / name, config, seed=seed)
    with (tmp_path / "fragen.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Nr.", "Frage", "Antwort"])
        writer.writerows([n, row["instruction"], row["response"]] for n, row in enumerate(tiny.make_rows(6, seed=3)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_newcomer_gets_from_a_shelf_and_a_csv_to_a_report(run, home):
    model_folder = tiny.save_model(home / "terse", terse=True)

    def follow(result: tuple[int, str, str], **others: str) -> tuple[int, str, str]:
        """Type what the last line says, with one's own data in the place of the example's."""
        code, _, err = result
        assert code == 0, result
        last = err.splitlines()[-1]
        assert last.startswith("next: coterie "), err
        for theirs, own in others.items():
            assert theirs in last
            last = last.replace(theirs, own)
        return run(*shlex.split(last.removeprefix("next: coterie ")))

    add = ["bank", "add", "shelf/", "adapters/maths", "adapters/law", "--model", model_folder]
    trained = ["--trained-on", "maths=fragen.csv"]
    columns = ["--map", "question=Frage", "--map", "response=Antwort"]
    refused(run("bnak", "add"), r"Did you mean 'bank'\? Or type: coterie --help$")
    refused(run("bank", "ad"), "type: coterie bank --help$")
    refused(run(*add[:4], "adapters/lwa", *add[5:], "--trained-onn", "x"), "--trained-on", "coterie bank add --help$")
    refused(run(*add, "--trained-on", "maths=frage.csv"), "frage.csv does not exist")
    refused(run(*add, *trained), "has the fields nr., frage, antwort; .*: --map FIELD=COLUMN$")
    refused(run(*add, *trained, "--map", "qestion=Frage"), "Did you mean 'question'")
    refused(run(*add, *trained, "--map", "question=Fage"), "--map question=fage: .* Did you mean 'Frage'")
    assert not (home / "shelf").exists()
    (home / "lücken.csv").write_text("Frage,Antwort\nWie?,So.\n,So.\n")
    refused(run(*add, "--trained-on", "maths=lücken.csv", *columns), "row 2 has an empty prompt; fill it in or delete")
    added = run(*add, *trained, *columns)
    assert "wrote shelf" in added[2] and added[2].endswith(f"{' '.join(columns)}\n")
    fitted = follow(added)
    assert "wrote runs/shelf" in fitted[2]
    refused(run("generate", "runs/shlef", "Hello"), "runs/shlef")
    refused(
        run("fit", "from-adapters", "--bank", "shelf", "--output", "x", "--router", "arow"), "'--router': 'arow' is"
    )
    (home / "questions.txt").write_text("Hello\n")
    refused(run("generate", "runs/shelf", "--input", "questions.txt"), "does not say what it holds; .* ends in .jsonl")
    refused(run("generate", "runs/shelf", "Hello", "--max-new-token", "3"), "--max-new-token")
    routed = run("route", "runs/shelf", "Hello")
    assert routed[0] == 0 and "maths" in routed[1] and "law" in routed[1]
    answered = follow(routed)
    assert answered[0] == 0 and len(answered[1]) > 0
    refused(follow(answered), "test.jsonl does not exist")
    evaluated = follow(answered, **{"test.jsonl": "fragen.csv"})
    assert evaluated[0] == 0, evaluated
    reported = follow(evaluated)
    assert reported[0] == 0 and reported[1] == "runs/shelf-eval/report.html\n"
    assert (home / reported[1].strip()).stat().st_size > 1000
    assert reported[2].splitlines()[-1] == "next: python3 -m webbrowser runs/shelf-eval/report.html"


def test_a_mixture_of_a_model_beside_it_answers_from_any_folder(run, home, model_folder, monkeypatch):
    (home / "model").symlink_to(model_folder)
    assert run("bank", "add", "shelf/", "adapters/maths", "--model", "model", "--device", "cpu")[0] == 0
    assert run("fit", "from-adapters", "--bank", "shelf/", "--output", "runs/shelf", "--device", "cpu")[0] == 0
    monkeypatch.chdir("runs")
    for words in ([home / "runs" / "shelf"], ["shelf"]):
        code, out, err = run("generate", *words, "add 3 4", "--max-new-tokens", 2, "--device", "cpu")
        assert code == 0 and out, err


def test_words_without_quotes_are_told_to_be_prompts_of_their_own(run, run_folder):
    note = "prompts of one word each; put quotes around a prompt of several words"
    for words in (["add", "3", "4"], ["add 3 4"], ["add 3 4", "spell"]):
        code, _, err = run("generate", run_folder, *words, "--max-new-tokens", 1, "--device", "cpu")
        assert code == 0 and (f"3 {note}" in err) == (len(words) == 3)


def test_a_base_model_in_place_of_a_mixture_is_told_and_what_makes_one(run, model_folder):
    code, _, err = run("generate", model_folder, "add 3 4")
    assert code == 2 and f"is a base model, not a mixture; type: coterie fit elrea --model {model_folder} --data" in err
