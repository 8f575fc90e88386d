"""A setting that another one keeps from acting is refused, not passed over; records of before are read as they are."""

from collections.abc import Iterator

import pytest

from coterie.errors import CoterieError
from coterie.settings import commands, groups
from coterie.settings.reading import Settings, changed, checked, from_flat
from helpers import refused

ELREA = {"model": "m", "data": ["d"], "output": "o"}
KSHOT = {"bank": "b", "shots": ["s"], "output": "o"}
EVAL = {"mixture": "m", "data": ["d"], "output": "o"}


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        (
            commands.ElreaSettings,
            {**ELREA, "cluster_threshold": 0.5, "cluster_method": "kmeans-pca"},
            "--cluster-threshold 0.5 does not act with --cluster-method kmeans-pca; leave it out, or",
        ),
        (
            commands.TokenLevelSettings,
            {**ELREA, "centroids": 3, "centroids_by": "performance"},
            "--centroids 3 does not act with --centroids-by performance",
        ),
        (
            commands.EvaluationSettings,
            {**EVAL, "few_shot_count": 5},
            "--few-shot-count 5 does not act without --few",
        ),
        (commands.EvaluationSettings, {**EVAL, "longest_prompt": 99}, "--longest-prompt 99 does not act without --few"),
        (commands.KshotSettings, {**KSHOT, "encoder": "hidden"}, "--encoder hidden does not act without --pool"),
        (commands.KshotSettings, {**KSHOT, "gamma": 3.0}, "--gamma 3.0 does not act with --rule max-cosine"),
        (
            commands.KshotSettings,
            {**KSHOT, "rationale_tokens": 9},
            "--rationale-tokens 9 does not act with --rat",
        ),
        (
            commands.KshotSettings,
            {**KSHOT, "rank_by": "perplexity", "max_new_tokens": 9},
            "--max-new-tokens 9 does not act with --rank-by perplexity",
        ),
        (
            commands.SelectSettings,
            {"folder": "f", "shots": ["s"], "output": "o", "diversity": "none", "candidates": 9},
            "--candidates 9 does not act with --diversity none",
        ),
        (
            commands.ProfileSettings,
            {"folder": "f", "data": ["d"], "skill_list": "a,b"},
            "--skill-list a,b does not act without --skills",
        ),
        (
            commands.ProfileSettings,
            {"folder": "f", "data": ["d"], "skills": "category", "synonyms": 0.9},
            "--synonyms 0.9 does not act with --skills category",
        ),
    ],
)
def test_a_value_that_would_not_act_is_refused_unless_a_record_holds_it(kind, given, told):
    with pytest.raises(CoterieError, match=told):
        from_flat(kind, given)
    checked(kind, given)


def of_groups() -> Iterator[type[Settings]]:
    return (kind for kind in vars(groups).values() if isinstance(kind, type) and issubclass(kind, Settings))


def test_the_names_and_values_that_keep_others_from_acting_exist():
    for kind in of_groups():
        for name, (other, idle) in kind.idle_with.items():
            assert name in kind.model_fields
            for value in idle:
                assert kind.model_validate({other: value}) is not None


def test_a_value_acts_where_the_other_one_lets_it():
    given = {**KSHOT, "gamma": 3.0, "rule": "kde", "rationale_tokens": 9, "rationales": "smollm2-135m"}
    assert from_flat(commands.KshotSettings, given).rows.gamma == 3.0
    assert changed(groups.GatherRowsSettings(gamma=3.0, rule="kde")) == ["--rule", "--gamma"]


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_flags_for_recruited_experts_are_refused_by_other_mixtures(run, run_folder, train_file, tmp_path, command):
    rest = {"generate": ["hi"], "eval": ["--data", train_file, "--output", tmp_path / "eval"]}[command]
    refused(run(command, run_folder, *rest, "--memory", 4), "--memory acts on runs of symbolic-moe only")


def test_how_open_data_is_gathered_is_not_said_without_any(run, tmp_path):
    words = ("fit", "kshot-moe", "--bank", tmp_path, "--shots", tmp_path, "--output", tmp_path / "run", "--budget", 9)
    refused(run(*words), "--budget says how open data is gathered; add --pool, or leave it out")


def test_a_revision_without_a_model_is_refused_beside_a_bank(run, tmp_path):
    words = ("fit", "from-adapters", "--bank", tmp_path, "--output", tmp_path / "run", "--revision", "main")
    refused(run(*words), "--revision goes with --model; the bank says which base model")


def test_how_an_aggregator_is_found_is_not_said_beside_one(fitted, run):
    words = ("fit", "symbolic-moe", "--experts", fitted.pool, "--output", fitted.folder / "other")
    refused(
        run(*words, "--aggregator", "majority", "--aggregator-tasks", 5),
        "--aggregator-tasks says how the best aggregator is found; leave out --aggregator, or this flag",
    )
