import math

import pytest

from sr4ir_dist.training.schedules import cosine, halving, learning_rate, warmup

RATES = {"base_lr": 3e-2, "floor": 1e-4}


def test_cosine_goes_from_base_through_the_middle_to_the_floor() -> None:
    rates = [cosine(step, **RATES, periods_in_steps=[10]) for step in range(13)]
    assert rates[0] == 3e-2
    assert rates[5] == pytest.approx((3e-2 + 1e-4) / 2, rel=1e-12)
    assert rates[10:] == [1e-4] * 3
    assert rates[:11] == sorted(rates[:11], reverse=True)


def test_a_boundary_belongs_to_the_period_that_it_ends() -> None:
    rates = [cosine(step, **RATES, periods_in_steps=[4, 36]) for step in range(41)]
    assert rates[4] == 1e-4
    expected = 1e-4 + 0.5 * (3e-2 - 1e-4) * (1 + math.cos(math.pi / 36))
    assert rates[5] == pytest.approx(expected, rel=1e-14)
    assert rates[5] > 0.99 * 3e-2
    assert rates[40] == 1e-4
    assert rates.count(1e-4) == 2


def test_warmup_leads_linearly_to_the_cosine_which_waits_for_it() -> None:
    settings = {**RATES, "periods_in_steps": [10, 135]}
    rates = [learning_rate(step, **settings, warmup_steps=5) for step in range(150)]
    assert rates[0] == pytest.approx(3e-2 / 5, rel=1e-14)
    steps = [b - a for a, b in zip(rates[:4], rates[1:5], strict=True)]
    assert steps == pytest.approx([3e-2 * 0.8 / 5] * 4, rel=1e-12)
    assert rates[4] < rates[5] == 3e-2
    assert rates[5:] == [cosine(step, **settings) for step in range(145)]
    assert learning_rate(3, **settings) == cosine(3, **settings)


def test_published_rates() -> None:
    # Detection without the restart ends above its floor: 29 of 30 epochs of one cosine are used.
    steps = 357
    last = learning_rate(
        30 * steps - 1, base_lr=2e-2, floor=1e-4, periods_in_steps=[30 * steps], warmup_steps=steps
    )
    assert last == pytest.approx(1.55e-4, abs=5e-7)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="step is -1"):
        cosine(-1, **RATES, periods_in_steps=[10])
    for periods in ([], [10, 0]):
        with pytest.raises(ValueError, match="periods_in_steps is"):
            cosine(0, **RATES, periods_in_steps=periods)
    with pytest.raises(ValueError, match="step is 5; the warm-up has 5 steps"):
        warmup(5, base_lr=1.0, steps=5)
    with pytest.raises(ValueError, match="step is -1"):
        warmup(-1, base_lr=1.0, steps=5)
    with pytest.raises(ValueError, match="warmup_steps is -1"):
        learning_rate(0, **RATES, periods_in_steps=[10], warmup_steps=-1)


def test_halvings_come_at_their_parts_of_the_run():
    rates = [halving(t, base_lr=8e-4, steps=100, at=(0.5, 0.8, 0.95)) for t in (0, 49, 50, 80, 99)]
    assert rates == pytest.approx([8e-4, 8e-4, 4e-4, 2e-4, 1e-4])
    with pytest.raises(ValueError, match="step is -1"):
        halving(-1, base_lr=1.0, steps=10, at=(0.5,))
