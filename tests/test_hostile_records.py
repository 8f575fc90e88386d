"""Whatever a stranger changed in a record: it is read, or refused in one line that names the file."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from coterie.artifacts import RunFolder
from coterie.backbone.loading import local_weights
from coterie.errors import CoterieError
from coterie.evaluation.clusters import cluster_records
from coterie.evaluation.compare import strange_sources
from coterie.experts.bank import load_adapter
from coterie.experts.bank_folder import open_bank
from coterie.experts.checkpoint import load_checkpoint
from coterie.experts.expert_pool import read_pool
from coterie.experts.reply_cache import ReplyCache
from coterie.features.embedding import SentenceEncoder
from coterie.methods.add_adapters import bank_add
from coterie.methods.extras import load_extra, read_losses
from coterie.methods.kshot.run import task_records
from coterie.methods.symbolic.fit import is_symbolic, load_symbolic
from coterie.methods.symbolic.profile import read_profile
from coterie.mixture import Mixture
from coterie.mixture.local_answers import LocalExpert
from coterie.mixture.memory import needed_bytes
from coterie.records.files import read_evaluation
from coterie.report import write_report
from coterie.report.terminal import weight_lines
from coterie.settings.groups import PlacementSettings
from hostile import ACTING, file_changes, json_changes, sample, survivors, tensor_changes
from report_pages import save
from test_embedding import make_bert, make_tokenizer
from test_report_kshot import full as full_task
from test_report_pictures import full as full_evaluation

FEW = 40


def check(file: Path, read, count: int = FEW, *, is_refused: bool = True) -> None:
    tensors = file.suffix == ".safetensors"
    changes = sample([*tensor_changes(file)], count, file.name) if tensors else file_changes(file, count)
    failures = survivors(file, changes, read, is_refused=is_refused)
    assert not failures, f"{len(failures)} of {len(changes)} changes of {file.name}:\n" + "\n".join(failures[:40])


# ---------------------------------------------------------------------------------------------------------- a mixture


@pytest.fixture(scope="module")
def folder(grid_folder, tmp_path_factory) -> Path:
    return shutil.copytree(grid_folder, tmp_path_factory.mktemp("hostile") / "run")


@pytest.fixture
def opened(folder, backbone, monkeypatch):
    """Open the mixture on the base model that is loaded already."""
    monkeypatch.setattr("coterie.mixture.folder.load_backbone", lambda _: backbone)
    return lambda: Mixture.from_pretrained(folder)


def test_a_mixture(folder, opened):
    check(folder / "mixture.json", opened)


def test_a_base_model_that_is_used_otherwise_is_not_the_mixtures_own(folder, opened):
    file = folder / "mixture.json"
    whole = file.read_text()
    record = json.loads(whole)
    file.write_text(json.dumps(record | {"base_model": record["base_model"] | {"config_sha256": "0" * 64}}))
    with pytest.raises(CoterieError, match="was trained on"):
        opened()
    file.write_text(whole)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter(folder, backbone, name):
    check(folder / "experts" / "base" / name, lambda: load_adapter(folder / "experts" / "base", backbone.model))


@pytest.mark.parametrize("name", ["adam.json", "adam.safetensors"])
def test_a_checkpoint(folder, backbone, name):
    checkpoint = folder / "checkpoints" / "epoch-0"
    check(checkpoint / name, lambda: load_checkpoint(checkpoint, backbone.model))


def test_a_routers_tensors(folder, opened):
    for file in sorted((folder / "router").iterdir()):
        check(file, opened)


def test_centroids_of_other_dimensions_than_the_features(folder, opened):
    """All alike, so that only what is compared with them tells that they do not fit."""
    file = folder / "router" / "centroids.safetensors"
    whole = file.read_bytes()
    save_file({name: own[..., :8].contiguous() for name, own in load_file(file).items()}, file)
    with pytest.raises(CoterieError, match="gives 256 dimensions, but the centroids of the expert .* have 8"):
        opened()
    file.write_bytes(whole)


def test_extras_and_their_tensors(folder, opened):
    mixture = opened()
    for extra in sorted((folder / "methods").iterdir()):
        read = lambda extra=extra: load_extra(mixture, extra.name)  # noqa: E731
        check(extra / "ingredient.json", read, FEW // 4)
        for file in extra.glob("router/*.safetensors"):
            check(file, read, FEW // 4)
    judged = load_extra(mixture, "judged")
    for name in ("ingredient.json", "judgement.safetensors"):
        check(judged.folder / name, lambda: read_losses(judged))


def test_training_rows(folder, opened):
    mixture = opened()
    check(folder / "clusters.jsonl", lambda: (cluster_records(folder), strange_sources(mixture, [])))


def test_the_record_of_a_run(folder, called, run):
    """As YAML, through the command that repeats it."""
    file, failures = folder / "run.yaml", []
    changes = sample([*json_changes(yaml.safe_load(file.read_text()))], 2 * FEW, "run.yaml")
    for what, text in changes:
        file.write_text(text)
        called.clear()
        try:
            code, out, err = run("run", file)
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            failures.append(f"{what}: {error!r}"[:300])
            continue
        lines = err.rstrip("\n").split("\n")
        is_told = code == 2 and not called and len(lines) == 1 and lines[0].startswith("error: ") and len(err) < 5000
        if not (is_told or (code == 0 and called)) or set(out + err) & set(ACTING.replace("\n", "")) - set("ab[2J1m"):
            failures.append(f"{what}: {code} {err}"[:300])
    assert not failures, f"{len(failures)} of {len(changes)}:\n" + "\n".join(failures[:40])


# ------------------------------------------------------------------------------------------------- banks, evaluations


@pytest.fixture(scope="module")
def bank(folder, model_folder, train_file, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("shelf") / "bank"
    own = {"model": str(model_folder), "trained_on": [f"base={train_file}"], "device": "cpu"}
    assert bank_add(target, [folder / "experts" / "base", folder / "experts" / "cluster-0"], **own)[0].card
    return target


@pytest.mark.parametrize("name", ["bank.json", "experts/base/card.json", "experts/base/questions.json"])
def test_a_bank(bank, name):
    def read() -> None:
        found = open_bank(bank)
        assert set(str(found)) & set(ACTING) <= set("ab[2J1m\n")
        found.trained_on("base")

    check(bank / name, read)


@pytest.mark.parametrize("name", ["evaluation.json", "rows.jsonl"])
def test_an_evaluation_and_its_page(name, tmp_path):
    target = save(tmp_path / "eval", *full_evaluation())
    check(target / name, lambda: read_evaluation(target), 4 * FEW)
    check(target / name, lambda: write_report(target), FEW // 4)


@pytest.mark.parametrize("name", ["selection/selection.json", "gathered/gather.json", "gates.json"])
def test_how_a_tasks_mixture_came_about(name, tmp_path):
    evaluation, _ = full_task()
    for part, file in (("selection", "selection/selection"), ("gathering", "gathered/gather"), ("gates", "gates")):
        path = tmp_path / f"{file}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(evaluation[part]))
    check(tmp_path / name, lambda: task_records(tmp_path))


# --------------------------------------------------------------------------------------------------- recruited experts


def test_a_pool_its_profile_and_what_was_fitted_on_them(fitted):
    pool, target = fitted.pool, fitted.folder / "run"
    check(pool / "pool.json", lambda: read_pool(pool))
    for name in ("profile.json", "validation.jsonl"):
        check(pool / "profile" / name, lambda: str(read_profile(pool / "profile")))
    check(target / "mixture.json", lambda: is_symbolic(target) and load_symbolic(target), 2 * FEW)
    check(pool / "replies.jsonl", lambda: ReplyCache(pool / "replies.jsonl"), is_refused=False)


# -------------------------------------------------------------------------------------------------------- one's own


def test_hashes_of_weights(model_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path))
    right = local_weights(str(model_folder))
    file = tmp_path / "weight-hashes.json"
    whole = file.read_bytes()
    for what, text in file_changes(file, FEW):
        file.write_bytes(text)
        found = local_weights(str(model_folder))
        assert isinstance(found, str), what
    file.write_bytes(whole)
    assert local_weights(str(model_folder)) == right


def test_what_a_run_keeps_for_another_try(tmp_path):
    cached = RunFolder(tmp_path).cache({})
    cached("scores", lambda: [1, 2])
    check(tmp_path / "cached" / "scores" / "value.json", lambda: cached("scores", lambda: [1, 2]))


@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json"])
def test_an_encoder(name, tmp_path):
    make_bert().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    texts = {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}],
        "1_Pooling/config.json": {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 16},
    }
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(texts[name]))
    check(file, lambda: SentenceEncoder(tmp_path)(["a"]), FEW // 2)


def test_a_pipe_in_place_of_weights_is_not_waited_for_when_memory_is_counted(model_folder, run_folder, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(run_folder / "experts" / "base", folder)
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    (tmp_path / "base").mkdir()
    os.mkfifo(tmp_path / "base" / "model.safetensors")
    shutil.copy(model_folder / "config.json", tmp_path / "base")
    with pytest.raises(CoterieError, match="is not a regular file"):
        needed_bytes(str(tmp_path / "base"), {"a": LocalExpert()}, PlacementSettings(device="cpu"), 1, 8)
    with pytest.raises(CoterieError, match="is not a regular file"):
        needed_bytes(str(model_folder), {"a": LocalExpert(folder)}, PlacementSettings(device="cpu"), 1, 8)


def test_weights_along_an_answer_show_others_names_as_text():
    routing = {"weights": {"ma\x1b[2Jths": 1.0}}
    (legend, line) = (str(text) for text in weight_lines({"routing": routing}))
    assert "ma\\u001b[2Jths" in legend and "ma\\u001b[2Jths" in line and "\x1b" not in legend + line
