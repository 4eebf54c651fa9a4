from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuft.config import Config
from tuft.metering import COSTS_A_UNIT, GIGABYTE, Charge, cost_of, price_of, rate_of
from tuft.sections import ModelPriceSection, PricesSection
from tuft.service.prices import Prices

PRICES = Prices(
    PricesSection(
        train=2.0,
        prefill=1.0,
        cached_prefill=0.1,
        sample=4.0,
        storage=0.2,
        models={"large": ModelPriceSection(train=20.0)},
    )
)


def test_a_models_own_price_is_its_price_and_the_others_are_those_of_all() -> None:
    assert PRICES.cost("training", "large", 10**6) == 20.0
    assert PRICES.cost("training", "small", 10**6) == 2.0
    assert PRICES.cost("sample", "large", 10**6) == 4.0
    assert PRICES.cost("checkpoint", "large", 10**6) == 0.0


def test_a_gigabyte_of_checkpoints_costs_its_price_after_720_hours() -> None:
    assert PRICES.cost("storage", "small", GIGABYTE * 720 * 3600) == 0.2


def test_the_most_that_a_request_may_cost_is_that_of_a_prompt_that_is_not_cached() -> None:
    charge = Charge("small", {"prefill": 10, "sample": 5})
    assert PRICES.most(charge) == cost_of("prefill", 10, rate_of(1.0)) + cost_of("sample", 5, rate_of(4.0))
    dear_cache = Prices(PricesSection(prefill=1.0, cached_prefill=3.0))
    assert dear_cache.most(charge) == cost_of("prefill", 10, rate_of(3.0))


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=50), st.integers(0, 10**6))
def test_costs_of_parts_add_up_to_the_cost_of_the_whole(parts: list[int], thousandths: int) -> None:
    rate = rate_of(thousandths / 1000)
    assert sum(cost_of("training", part, rate) for part in parts) == cost_of("training", sum(parts), rate)
    assert cost_of("training", 10**6, rate) / COSTS_A_UNIT == pytest.approx(price_of(rate))


def test_the_price_of_a_model_that_is_not_served_is_refused() -> None:
    models = [{"name": "small"}]
    with pytest.raises(ValueError, match="'lagre' is not among base_models: small"):
        Config(base_models=models, prices={"models": {"lagre": {"train": 1.0}}})
    assert Config(base_models=models, prices={"models": {"small": {"train": 1.0}}}).prices.models["small"].train == 1.0
