"""Intervals, the comparison of two models, and the gate's drills."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from components.scoring import bootstrap
from components.scoring.benchmarks import Scored, Unit
from components.scoring.gate import GateSettings, decide
from components.scoring.paired import OtherQuestions, compare
from llava.errors import RefusedInput

N = 200


def outcome(name: str, right: Sequence[float], key: str = "q") -> Scored:
    """Right or wrong on one question after the other; `accuracy` in percent."""
    values = np.array(right, dtype=np.float64)
    units = [
        Unit((f"{key}{place}",), "?", "yes", str(value), float(value)) for place, value in enumerate(values)
    ]
    sums = np.stack([np.ones(len(values)), values], axis=1)
    return Scored(name, units, sums, lambda s: {"accuracy": 100 * s[..., 1] / s[..., 0]}, len(units))


def share(right: int, of: int = N) -> list[float]:
    return [1.0] * right + [0.0] * (of - right)


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    one = outcome("vqa", share(60))
    low, high = bootstrap.intervals(one.sums, one.formula)["accuracy"]
    # 30 % of 200: standard deviation 100 sqrt(0.3 x 0.7 / 200) = 3.24, so 30 +- 1.96 x 3.24
    assert low == pytest.approx(30 - 6.35, abs=0.5)
    assert high == pytest.approx(30 + 6.35, abs=0.5)


def test_intervals_of_distinct_rows_agree_with_the_plain_bootstrap() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=80)
    sums = np.stack([np.ones(80), values], axis=1)
    found = bootstrap.intervals(sums, lambda s: {"mean": s[..., 1] / s[..., 0]})["mean"]
    draws = np.random.default_rng(4).choice(values, size=(10_000, 80)).mean(axis=1)
    assert found == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.02)


def test_intervals_are_the_same_every_time() -> None:
    one = outcome("vqa", share(60))
    assert bootstrap.intervals(one.sums, one.formula) == bootstrap.intervals(one.sums, one.formula)


def test_pairing_makes_the_interval_of_a_difference_narrow() -> None:
    base, new = outcome("vqa", share(100)), outcome("vqa", share(110))
    found = compare(base, new).differences["accuracy"]
    # 10 of 200 changed, all for the better: deviation of the mean change 100 sqrt(0.05 x 0.95 / 200) = 1.54
    assert (found.base, found.new, found.gain) == (50.0, 55.0, 5.0)
    assert (found.low, found.high) == pytest.approx((5 - 1.96 * 1.54, 5 + 1.96 * 1.54), abs=0.6)
    # Unpaired, the deviation would be 5: zero would lie well inside.
    assert found.low > 0


def test_wins_ties_losses_and_changed_questions_are_counted_by_question_not_by_place() -> None:
    base = outcome("vqa", [1, 0, 0, 1, 1])
    new = outcome("vqa", [0, 1, 0, 1, 1])
    shuffled = Scored(new.benchmark, new.units[::-1], new.sums[::-1], new.formula, new.n)
    found = compare(base, shuffled)
    assert (found.n, found.wins, found.ties, found.losses) == (5, 1, 3, 1)
    assert [before.key for before, _ in found.changed] == [("q1",), ("q0",)]


def test_questions_without_a_judgement_for_one_model_are_left_out_of_both() -> None:
    base, new = outcome("vqa", [1, 0, 1, 1]), outcome("vqa", [1, 1, 0, 1])
    unjudged = [*new.units[:2], Unit(new.units[2].key, "?", "", "", float("nan")), new.units[3]]
    found = compare(base, Scored("vqa", unjudged, new.sums, new.formula, 4))
    assert (found.n, found.left_out, found.losses) == (3, 1, 0)
    assert found.differences["accuracy"].base == pytest.approx(200 / 3)


def test_other_questions_or_labels_are_refused_with_their_numbers() -> None:
    with pytest.raises(OtherQuestions, match="5 of 10 only in the first, 0 of 5 only in the second"):
        compare(outcome("vqa", share(5, 10)), outcome("vqa", share(5, 5)))
    with pytest.raises(OtherQuestions, match="different benchmarks"):
        compare(outcome("vqa", share(5, 10)), outcome("pope", share(5, 10)))


GATE = GateSettings(benchmarks=("vqa/accuracy",))


def test_a_model_that_is_clearly_better_is_promoted() -> None:
    verdict = decide(GATE, {"vqa": outcome("vqa", share(100))}, {"vqa": outcome("vqa", share(140))})
    assert verdict.promote
    assert verdict.reason.startswith("vqa/accuracy 70.00 against 50.00, +20.00 [+")
    assert verdict.reason.endswith("at 95 % on 200 questions (40 better, 0 worse): better")


def test_a_model_that_is_clearly_worse_is_not_promoted() -> None:
    verdict = decide(GATE, {"vqa": outcome("vqa", share(140))}, {"vqa": outcome("vqa", share(100))})
    assert not verdict.promote
    assert verdict.reason.endswith("worse")


def test_a_model_that_is_equal_within_noise_is_not_promoted() -> None:
    base = outcome("vqa", share(100))
    other = outcome("vqa", [0.0] * 18 + [1.0] * 102 + [0.0] * 80)  # 20 better, 18 worse: +1 %
    verdict = decide(GATE, {"vqa": base}, {"vqa": other})
    assert not verdict.promote
    assert "+1.00" in verdict.reason
    assert verdict.reason.endswith("equal within noise")


def test_a_gain_that_may_be_smaller_than_the_rule_wants_is_not_enough() -> None:
    models = {"vqa": outcome("vqa", share(100))}, {"vqa": outcome("vqa", share(110))}
    assert decide(GATE, *models).promote
    verdict = decide(GATE.model_copy(update={"minimum_difference": 4.0}), *models)
    assert not verdict.promote
    assert verdict.reason.endswith("better, but not surely by more than 4")


def test_a_floor_that_is_undercut_keeps_the_champion_whatever_was_gained_elsewhere() -> None:
    gate = GateSettings(benchmarks=("vqa/accuracy",), floors={"pope/accuracy": 80.0})
    base = {"vqa": outcome("vqa", share(100)), "pope": outcome("pope", share(170))}
    good = {"vqa": outcome("vqa", share(140)), "pope": outcome("pope", share(160))}
    assert decide(gate, base, good).promote
    verdict = decide(gate, base, good | {"pope": outcome("pope", share(159))})
    assert not verdict.promote
    assert verdict.reason.startswith(
        "floor undercut: pope/accuracy 79.50 is under its floor 80; vqa/accuracy 70.00"
    )


def test_all_deciding_scores_must_be_gained_on() -> None:
    gate = GateSettings(benchmarks=("vqa/accuracy", "pope/accuracy"))
    base = {"vqa": outcome("vqa", share(100)), "pope": outcome("pope", share(100))}
    new = {"vqa": outcome("vqa", share(140)), "pope": outcome("pope", share(100))}
    assert not decide(gate, base, new).promote
    assert decide(gate, base, new | {"pope": outcome("pope", share(130))}).promote


def test_other_questions_are_no_promotion_and_the_reason_says_so() -> None:
    verdict = decide(
        GATE, {"vqa": outcome("vqa", share(10))}, {"vqa": outcome("vqa", share(200), key="other")}
    )
    assert not verdict.promote
    assert verdict.reason.startswith(
        "refused: not comparable: vqa: the questions or their labels differ: 200 of 200"
    )


def test_a_rule_that_names_a_score_that_was_not_measured_is_refused() -> None:
    models = {"vqa": outcome("vqa", share(10))}, {"vqa": outcome("vqa", share(10))}
    with pytest.raises(RefusedInput, match="names 'pope/f1', which was not measured; known: vqa/accuracy"):
        decide(GATE.model_copy(update={"floors": {"pope/f1": 1.0}}), *models)
