"""Skills of questions, experts' profiles, and recruiting: every formula on worked numbers."""

import math
from collections import Counter

import pytest
import torch

from coterie.errors import CoterieError
from coterie.features import skills as sk
from coterie.features.skills import (
    choice_request,
    chosen_skills,
    kept_keywords,
    keyword_request,
    load_embed,
    merge_synonyms,
    nearest_skills,
    parse_keywords,
)
from coterie.routers import skill as rs
from coterie.routers.skill import (
    build_profile,
    competency,
    credit_from_likelihood,
    profile_from,
    random_recruits,
    recruit,
    relevance,
    replace_rare,
    suitability,
)
from coterie.settings.groups import RecruitSettings

NAN = math.nan


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Keywords: Algebra, Number Theory.", ["algebra", "number theory"]),
        ("Keywords: no\nQuestion\nKeywords:\n\n  a ,b,, c\nand so on", ["a", "b", "c"]),
        ("algebra, and no mark", ["algebra", "and no mark"]),
        ("Keywords: twenty characters ok, twenty-one characters", ["twenty characters ok"]),
        ("Keywords: a  b,A   B", ["a b", "a b"]),
        ("Keywords:", []),
        ("", []),
    ],
)
def test_keywords_are_read_as_published(text, words):
    assert parse_keywords(text) == words


def test_keywords_are_kept_when_they_come_back():
    samples = ["Keywords: b, a", "Keywords: a, c", "Keywords: a, d", "junk", "Keywords: b, b, e"]
    assert kept_keywords(samples) == ("b", "a")
    assert kept_keywords(["Keywords: a, b"]) == () == kept_keywords([])


def test_the_requests_hold_the_question_and_the_options():
    assert keyword_request("Why {is} it?").endswith("Question: Why {is} it?\n")
    asked = choice_request("Why?", ["maths", "law"])
    assert "Question: Why?" in asked and "(A) maths\n(B) law\n" in asked and asked.endswith("Answer:")
    for count in (1, 27):
        with pytest.raises(CoterieError, match=f"between 2 and 26 skills, got {count}"):
            choice_request("Why?", ["x"] * count)


def test_a_choice_is_freed_from_a_liking_for_letters_and_keeps_what_is_half_as_likely():
    blank = torch.tensor([0.8, 0.1, 0.1]).log()
    given = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.62, 0.2, 0.18]]).log()
    # divided by blank: (1, 1, 1), (0.75, 3, 1), (0.775, 2, 1.8)
    assert chosen_skills(given, blank, ["a", "b", "c"]) == [("a", "b", "c"), ("b",), ("b", "c")]
    many = torch.zeros(1, 8)
    assert chosen_skills(many, torch.zeros(8), list("abcdefgh")) == [("a", "b", "c", "d", "e")]


VECTORS = {
    "algebra": (1.0, 0.0),
    "algebraic": (0.96, 0.28),
    "geometry": (0.6, 0.8),
    "shapes": (0.5, 0.866),
    "law": (0.0, -1.0),
}


def embed(texts):
    return torch.tensor([VECTORS[text] for text in texts])


def test_synonyms_join_the_most_frequent_name():
    counts = {"algebraic": 2, "algebra": 5, "shapes": 3, "geometry": 3, "law": 1}
    assert merge_synonyms(counts, embed, 0.9) == {
        "algebra": "algebra",
        "geometry": "geometry",
        "shapes": "geometry",  # cosine 0.993; as frequent, so the alphabet decides
        "algebraic": "algebra",  # cosine 0.96 to algebra, 0.8 to geometry
        "law": "law",
    }
    assert merge_synonyms(counts, embed, 0.5)["geometry"] == "algebra"
    assert merge_synonyms(counts, embed, 1.1) == {skill: skill for skill in counts} == merge_synonyms(counts, None, 0.5)


def test_a_strange_skill_goes_to_the_nearest_known_one():
    assert nearest_skills(["law", "shapes", "algebraic"], ["algebra", "geometry"], embed) == {
        "law": "algebra",
        "shapes": "geometry",
        "algebraic": "algebra",
    }
    assert nearest_skills(["algebra"], ["algebra"], None) == {"algebra": "algebra"}
    assert nearest_skills(["law", "algebra"], ["algebra"], None) == {"algebra": "algebra"}
    assert nearest_skills(["law"], [], embed) == {}


def test_encoders_are_loaded_by_name(tmp_path):
    assert load_embed("none") is None
    with pytest.raises(
        CoterieError, match="no encoder, local folder or hub id is called 'minlim'. Did you mean 'minilm'"
    ):
        load_embed("minlim")
    with pytest.raises(CoterieError, match="the encoder in"):
        load_embed(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------- profiles

QUESTIONS = [("x", "y"), ("x",), ("x", "z"), ("y",)]
SCORES = torch.tensor([[1.0, 1.0, -1.0, 1.0], [-1.0, NAN, 1.0, -1.0]])


@pytest.fixture
def profile():
    return build_profile(["a", "b"], QUESTIONS, SCORES)


def test_a_profile_adds_one_for_right_and_takes_one_for_wrong(profile):
    assert profile.skills == ("x", "y", "z")
    assert profile.values("counts").tolist() == [[1, 2, -1], [0, -2, 1]]
    assert profile.trials.tolist() == [[3, 2, 1], [2, 2, 1]], "a question without an answer is no trial"
    assert profile.accuracy.tolist() == pytest.approx([3 / 4, 1 / 3])


def test_shrunk_values_are_the_mean_of_a_beta_posterior(profile):
    # a: prior (3+1)/(4+2) = 2/3; x: (2 + 4*2/3)/(3+4) = 2/3, y: (2 + 8/3)/6 = 7/9, z: (0 + 8/3)/5 = 8/15
    # b: prior (1+1)/(3+2) = 2/5; x: (1 + 1.6)/6, y: (0 + 1.6)/6, z: (1 + 1.6)/5
    means = [[2 / 3, 7 / 9, 8 / 15], [2.6 / 6, 1.6 / 6, 2.6 / 5]]
    assert profile.values("shrunk").flatten().tolist() == pytest.approx([2 * p - 1 for row in means for p in row])


def test_an_expert_that_answered_nothing_has_a_profile():
    silent = build_profile(["a"], QUESTIONS, torch.full((1, 4), NAN))
    assert silent.accuracy.tolist() == [0] and silent.values("counts").tolist() == [[0, 0, 0]]
    assert silent.values("shrunk").tolist() == [[0, 0, 0]]


def test_a_profile_without_a_question_is_that_of_the_others(profile):
    left = profile.without(QUESTIONS[2], SCORES[:, 2])
    others = build_profile(["a", "b"], [QUESTIONS[i] for i in (0, 1, 3)], SCORES[:, [0, 1, 3]], profile.skills)
    for name in ("right", "trials", "overall_right", "overall_trials"):
        assert torch.equal(getattr(left, name), getattr(others, name))


def test_a_profile_is_read_as_it_was_written(profile):
    again = profile_from(profile.record(), "profile.json")
    assert torch.equal(again.values("shrunk"), profile.values("shrunk")) and again.skills == profile.skills
    for broken, message in (
        ({}, "profile.json, 'experts': is missing"),
        ({**profile.record(), "right": [[1]]}, "profile.json: 'right' should be 2 lists of"),
        ({**profile.record(), "trials": None}, "profile.json, 'trials': should be"),
        ({**profile.record(), "overall_right": [NAN, 1]}, "profile.json, 'overall_right' 1: should be a finite number"),
    ):
        with pytest.raises(CoterieError, match=message):
            profile_from(broken, "profile.json")


def test_likelihoods_become_scores_around_the_experts_mean():
    logprobs = torch.tensor([[-1.0, -5.0, -2.0], [-3.0, -5.0, -2.2]])
    # above the mean: 1, 0, 0.1 and the same below; their root mean square: sqrt((1 + 0 + 0.01) / 3)
    spread = math.sqrt(1.01 / 3)
    assert credit_from_likelihood(logprobs).tolist() == [
        pytest.approx([1, 0, 0.1 / spread]),
        pytest.approx([-1, 0, -0.1 / spread], abs=1e-6),
    ]
    assert credit_from_likelihood(torch.zeros(2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


# -------------------------------------------------------------------------------------------------------- recruiting


def test_suitability_sums_the_values_of_a_question_s_skills(profile):
    values = profile.values("counts")
    found = suitability(values, profile.skills, [("x", "y"), ("y", "y"), ("unknown",), ()])
    assert found.tolist() == [[3, -2], [4, -4], [0, 0], [0, 0]]
    assert suitability(values, profile.skills, []).shape == (0, 2)


def test_competency_is_the_squared_share():
    assert competency(torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist() == pytest.approx([9 / 10, 1 / 10])
    # sums 2, -1: shifted by 1 + 1 to 4, 1; squared 16, 1
    assert competency(torch.tensor([[1.0, 1.0], [-2.0, 1.0]])).tolist() == pytest.approx([16 / 17, 1 / 17])
    assert competency(torch.zeros(2, 3)).tolist() == [0.5, 0.5]


def test_relevance_as_in_the_released_code():
    local = torch.tensor([[3.0, -2.0, 1.0], [-1.0, -3.0, 0.0]])
    general = torch.tensor([0.5, 0.4, 0.1])
    # first: only positive ones count, 1.5 and 0.1; second: shifted to 3, 1, 4, times competency 1.5, 0.4, 0.4
    assert relevance(local, general, "power").tolist() == [
        pytest.approx([1.5 / 1.6, 0, 0.1 / 1.6]),
        pytest.approx([1.5 / 2.3, 0.4 / 2.3, 0.4 / 2.3]),
    ]
    idle = relevance(torch.tensor([[1.0, -1.0]]), torch.tensor([0.0, 1.0]), "power")
    assert idle.tolist() == [[0.5, 0.5]], "the only suitable expert has no competency: all alike"


def test_relevance_as_in_the_paper():
    local, general = torch.tensor([[3.0, -2.0]]), torch.tensor([0.8, 0.2])
    a, b = math.exp(3 * 0.8 / 0.5), math.exp(-2 * 0.2 / 0.5)
    assert relevance(local, general, "softmax").tolist() == [pytest.approx([a / (a + b), b / (a + b)])]


def many(count: int) -> tuple[list[tuple[str, ...]], list[str]]:
    return [("x",)] * count, [f"question {number}" for number in range(count)]


@pytest.fixture
def three():
    """Three experts, good at x as 6, 3 and 1, so that competency is 36, 9, 1 of 46, weights 216, 27, 1 of 244."""
    scores = torch.tensor([[1.0] * 8 + [-1.0] * 2, [1.0] * 6 + [-1.0] * 3 + [NAN], [1.0] * 5 + [-1.0] * 4 + [NAN]])
    return build_profile(["a", "b", "c"], [("x",)] * 10, scores)


def test_draws_follow_the_weights(three):
    settings = RecruitSettings(profile="counts", min_share=0)
    found = recruit(three, *many(4000), settings)
    assert found.routing.weights.sum(dim=1).tolist() == [3.0] * 4000
    assert found.relevance[0].tolist() == pytest.approx([216 / 244, 27 / 244, 1 / 244])
    shares = found.routing.weights.mean(dim=0) / 3
    assert shares.tolist() == pytest.approx([216 / 244, 27 / 244, 1 / 244], abs=0.01)


def test_without_replacement_nobody_answers_twice(three):
    settings = RecruitSettings(profile="counts", min_share=0, replacement=False, recruits=2)
    weights = recruit(three, *many(4000), settings).routing.weights
    assert weights.max() == 1 and weights.sum(dim=1).tolist() == [2.0] * 4000
    # P(a among two) = p_a + p_b p_a/(1-p_b) + p_c p_a/(1-p_c)
    pa, pb, pc = 216 / 244, 27 / 244, 1 / 244
    assert float(weights[:, 0].mean()) == pytest.approx(pa + pb * pa / (1 - pb) + pc * pa / (1 - pc), abs=0.01)


def test_without_replacement_only_suitable_experts_are_drawn(profile):
    settings = RecruitSettings(min_share=0, replacement=False, recruits=3)
    assert recruit(profile, [("y",)], ["q"], settings).routing.row(0) == {"a": 1, "b": 0}


def test_top_takes_the_best_without_chance(three):
    settings = RecruitSettings(sampler="top", recruits=2)
    for seed in (0, 1):
        assert recruit(three, [("x",)], ["q"], settings, seed).routing.row(0) == {"a": 1, "b": 1, "c": 0}
    even = build_profile(["a", "b"], [("x",)], torch.ones(2, 1))
    assert recruit(even, [("x",)], ["q"], RecruitSettings(sampler="top", recruits=1)).routing.row(0) == {"a": 1, "b": 0}


def test_a_question_without_a_known_skill_draws_by_the_overall_accuracy(three):
    general = torch.tensor([(8 + 1) / (10 + 2), (6 + 1) / (9 + 2), (5 + 1) / (9 + 2)])
    expected = (2 * general - 1) ** 3  # suitability times competency, which is its square
    names = [str(number) for number in range(4000)]
    for questions in ([()] * 4000, [("unheard of",)] * 4000):
        found = recruit(three, questions, names, RecruitSettings(min_share=0))
        assert found.relevance[0].tolist() == pytest.approx((expected / expected.sum()).tolist())
        shares = found.routing.weights.mean(dim=0) / 3
        assert shares.tolist() == pytest.approx((expected / expected.sum()).tolist(), abs=0.01)
    best = recruit(three, [()], ["q"], RecruitSettings(sampler="top", recruits=1))
    assert best.routing.row(0) == {"a": 1, "b": 0, "c": 0}


def test_experts_of_which_nothing_is_known_are_drawn_alike_where_no_skill_is_known():
    untried = build_profile(["a", "b"], [("x",)], torch.full((2, 1), NAN))
    assert recruit(untried, [()], ["q"], RecruitSettings()).relevance.tolist() == [[0.5, 0.5]]


def test_a_seed_gives_the_same_draws_whatever_else_is_asked(three):
    settings = RecruitSettings(min_share=0)
    questions, names = many(50)
    first = recruit(three, questions, names, settings, seed=1).routing.weights
    alone = [recruit(three, [("x",)], [name], settings, seed=1).routing.weights[0] for name in names]
    assert torch.equal(first, torch.stack(alone))
    assert torch.equal(first, recruit(three, questions, names, settings, seed=1).routing.weights)
    assert not torch.equal(first, recruit(three, questions, names, settings, seed=2).routing.weights)


def test_rare_experts_are_replaced_in_proportion_to_the_frequent_ones():
    drawn = [[0, 0, 0]] * 60 + [[1, 1, 1]] * 30 + [[0, 1, 2]] * 3 + [[2, 2, 2]] * 1
    found = replace_rare(drawn, 0.05, distinct=False)
    counts = Counter(expert for own in found for expert in own)
    assert counts[2] == 0 and sum(counts.values()) == 3 * len(drawn)
    assert found[:90] == drawn[:90]
    large = replace_rare([[0]] * 6000 + [[1]] * 3000 + [[2]] * 400, 0.05, distinct=False)
    replaced = Counter(own[0] for own in large[9000:])
    assert replaced[0] / 400 == pytest.approx(2 / 3, abs=0.07) and replaced[2] == 0
    assert replace_rare(drawn, 0.05, distinct=False, seed=1) != found


def test_the_share_counts_questions_and_its_bound_is_kept():
    drawn = [[0, 1, 1]] * 5 + [[0, 0, 0]] * 95
    assert replace_rare(drawn, 0.05, distinct=False) == drawn
    assert replace_rare(drawn, 0.06, distinct=False) == [[0, 0, 0]] * 100
    assert replace_rare([[0], [1], [2]], 0.5, distinct=False) == [[0], [1], [2]], "nobody is frequent: nothing changes"
    assert replace_rare([], 0.5, distinct=False) == []


def test_a_replaced_expert_does_not_come_twice_where_experts_are_distinct():
    drawn = [[0, 1]] * 50 + [[0, 2]]
    assert replace_rare(drawn, 0.05, distinct=True)[-1] == [0, 1]
    assert replace_rare([[0]] * 50 + [[0, 2]], 0.05, distinct=True)[-1] == [0]


def test_the_filter_runs_when_experts_are_recruited(three):
    rare = recruit(three, *many(200), RecruitSettings(min_share=0)).routing.weights[:, 2]
    assert 0 < (rare > 0).sum() < 10
    assert recruit(three, *many(200), RecruitSettings()).routing.weights[:, 2].sum() == 0


def test_random_experts_are_drawn_whatever_a_question_needs():
    routing = random_recruits(["a", "b", "c"], [str(n) for n in range(3000)], RecruitSettings())
    assert (routing.weights.mean(dim=0) / 3).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)


def test_the_constants_are_the_published_ones():
    assert (sk.LONGEST_KEYWORD, sk.LEAST_SAMPLES, rs.TEMPERATURE) == (20, 2, 0.5)
    settings = RecruitSettings()
    assert (settings.recruits, settings.sampler, settings.replacement, settings.min_share) == (3, "power", True, 0.05)
