"""LESS: influence is the sum over checkpoints of cosines of Adam's steps and gradients, and finds rows of one kind."""

import importlib
import json

import pytest
import torch
from torch import nn

import coterie
import tiny
from conftest import write_rows
from coterie.data.examples import load_examples
from coterie.errors import CoterieError
from coterie.experts.checkpoint import load_checkpoint
from coterie.methods.influence import best_task
from helpers import adams_step, normal, peft_factors, refused

module = importlib.import_module("coterie.methods.influence")  # the function has its name


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    rows = [row for row in tiny.make_rows(30, seed=7) if row["source"] == "spell"]
    return write_rows(tmp_path_factory.mktemp("influence") / "few.jsonl", rows[:4])


@pytest.fixture(scope="module")
def found(run_folder, few, train_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("influence") / "found"
    return coterie.influence(
        run_folder, str(few), str(train_file), output=output, share=0.25, d_proj=4096, device="cpu"
    )


def gradients_of_answers(model, parameters, row) -> dict[str, torch.Tensor]:
    for parameter in parameters.values():
        parameter.grad = None
    labels = torch.tensor([row.labels()])
    model(input_ids=torch.tensor([row.ids]), labels=labels).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}


def test_scores_are_those_of_a_loop_of_autograd_and_adam(mixture, run_folder, few, train_file, found):
    rows = [mixture.prompts.row(example) for example in load_examples(train_file)[:6]]
    aimed = [mixture.prompts.row(example) for example in load_examples(few)]
    total, rates = torch.zeros(6, len(aimed)), []
    for epoch in (0, 1):
        folder = run_folder / "checkpoints" / f"epoch-{epoch}"
        state = load_checkpoint(folder, mixture.backbone.model).adam
        model, parameters = peft_factors(mixture.backbone.model, folder)
        steps, wanted = [], []
        for row in rows:
            gradients = gradients_of_answers(model, parameters, row)
            parts = [adams_step(own, gradients[name], name, state).flatten() for name, own in parameters.items()]
            steps.append(torch.cat(parts))
        for row in aimed:
            wanted.append(torch.cat([own.flatten() for own in gradients_of_answers(model, parameters, row).values()]))
        unit = [nn.functional.normalize(torch.stack(own), dim=1) for own in (steps, wanted)]
        rates.append(state.learning_rate)
        total += state.learning_rate * (unit[0] @ unit[1].T)
    expected = (total / sum(rates)).mean(dim=1)
    torch.testing.assert_close(found.scores[:6], expected, rtol=0, atol=0.03)  # 1 / sqrt(4096) is 0.016 for one cosine
    assert float(torch.corrcoef(torch.stack([found.scores[:6], expected]))[0, 1]) > 0.95


def test_rows_of_the_kind_that_is_aimed_at_have_the_largest_influence(found):
    """A third of the data spells; a quarter of it is chosen."""
    assert len(found.chosen) == 9
    assert [found.examples[i].source for i in found.chosen] == ["spell"] * 9
    assert "chosen.jsonl: 9 of 36 rows, influence" in str(found)


def test_in_a_subspace_cosines_are_of_projections_onto_the_strongest_directions_aimed_at():
    rows, aimed = normal(7, 30, seed=0), normal(5, 30, seed=1)
    _, _, vectors = torch.linalg.svd(aimed)
    for count in (1, 3, 5):
        projector = vectors[:count].T @ vectors[:count]
        wanted = [[torch.cosine_similarity(projector @ a, projector @ b, 0) for b in aimed] for a in rows]
        torch.testing.assert_close(module.alignment(rows, aimed, count), torch.tensor(wanted), rtol=1e-3, atol=1e-4)
    plain = [[torch.cosine_similarity(a, b, 0) for b in aimed] for a in rows]
    torch.testing.assert_close(module.alignment(rows, aimed), torch.tensor(plain), rtol=1e-4, atol=1e-5)


def test_plain_gradients_in_a_subspace_find_the_kind_that_is_aimed_at_too(run_folder, few, train_file, tmp_path):
    how = {"share": 0.25, "d_proj": 4096, "device": "cpu", "geometry": "subspace", "directions": 3}
    found = coterie.influence(run_folder, str(few), str(train_file), output=tmp_path / "found", **how)
    assert [found.examples[i].source for i in found.chosen] == ["spell"] * 9


def test_the_best_rows_are_written_out_in_the_common_form_and_every_score(found):
    chosen = load_examples(found.folder / "chosen.jsonl", ignore_fields="influence")
    assert [row.id for row in chosen] == [found.examples[i].id for i in found.chosen]
    assert [row.messages for row in chosen] == [found.examples[i].messages for i in found.chosen]
    scores = [json.loads(line) for line in (found.folder / "scores.jsonl").read_text().splitlines()]
    assert [row["influence"] for row in scores] == pytest.approx(found.scores.tolist())
    written = [json.loads(line)["influence"] for line in (found.folder / "chosen.jsonl").read_text().splitlines()]
    assert written == sorted(written, reverse=True)


def test_of_several_tasks_the_one_that_a_row_helps_most_counts():
    influences = torch.tensor([[0.1, 0.3, 0.0], [0.0, 0.0, 0.9]])
    assert best_task(influences, ["a", "a", "b"]).tolist() == pytest.approx([0.2, 0.9])
    assert best_task(influences, [None] * 3).tolist() == pytest.approx([0.4 / 3, 0.3])


def test_an_interrupted_run_keeps_its_features(run_folder, few, train_file, found, tmp_path, monkeypatch):
    options = {"output": tmp_path / "again", "share": 0.25, "d_proj": 4096, "device": "cpu"}
    with monkeypatch.context() as patch:
        patch.setattr(module, "best_task", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            coterie.influence(run_folder, str(few), str(train_file), **options)
    monkeypatch.setattr(module, "write_features", lambda *_: pytest.fail("these features were there"))
    again = coterie.influence(run_folder, str(few), str(train_file), **options)
    assert torch.equal(again.scores, found.scores)


def test_the_next_command_trains_the_runs_own_base_model_on_the_chosen_rows(run, run_folder, train_file, tmp_path):
    rows = [json.loads(line) for line in train_file.read_text().splitlines()]
    renamed = [{("reply" if name == "response" else name): value for name, value in row.items()} for row in rows]
    data, output = write_rows(tmp_path / "renamed.jsonl", renamed), tmp_path / "found"
    files = ("--target", data, "--data", data, "--map", "response=reply")
    code, _, err = run("influence", run_folder, *files, "--d-proj", 64, "--output", output)
    base = json.loads((run_folder / "mixture.json").read_text())["base_model"]["id"]
    following = f"coterie fit elrea --model {base} --data {output}/chosen.jsonl --output runs/chosen"
    assert (code, err.splitlines()[-1]) == (0, f"next: {following}")
    assert len(load_examples(output / "chosen.jsonl")) == 2  # read without --map, since these rows are its own


def test_trouble_is_told_before_anything_is_computed(run, run_folder, few, train_file, tmp_path):
    where = ("--output", tmp_path / "out")
    refused(run("influence", run_folder, "--target", few, "--data", "nowhere.jsonl", *where), "nowhere.jsonl")
    refused(run("influence", run_folder, "--target", few, "--data", train_file, "--share", 0, *where), "--share")
    assert not (tmp_path / "out").exists()
    questions = write_rows(tmp_path / "questions.jsonl", [{"instruction": "add 1 2"}])
    refused(run("influence", run_folder, "--target", questions, "--data", train_file, *where), "response")


def test_a_mixture_without_checkpoints_is_refused(mixture, few, train_file, tmp_path):
    mixture.save_pretrained(tmp_path / "copy")
    for file in (tmp_path / "copy" / "checkpoints").glob("epoch-*"):
        file.rename(file.with_name("old-" + file.name))
    with pytest.raises(CoterieError, match="has no checkpoints/epoch-0, whose gradients tell influence"):
        coterie.influence(tmp_path / "copy", str(few), str(train_file), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_where_the_rows_are(run, run_folder, few, train_file, tmp_path):
    code, out, err = run(
        "influence", run_folder, "--target", few, "--data", train_file, "--output", tmp_path / "out", "--d-proj", 64
    )
    assert code == 0 and out.startswith(f"{tmp_path / 'out'}/chosen.jsonl: 2 of 36 rows, influence ")
    assert f"wrote {tmp_path / 'out'}" in err
