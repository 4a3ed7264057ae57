"""Parse prices and clean texts as users write them."""

from __future__ import annotations

from decimal import Decimal

import pytest

from antdist.data.ingest.readers.base import Tally, clean_text, compose_text, parse_price, read_price


@pytest.mark.parametrize(
    ("value", "price"),
    [
        ("$1,299.00", 1299.0),
        ("$25.00", 25.0),
        ("25", 25.0),
        (" £ 3.50 ", 3.5),
        ("3.50 €", 3.5),
        ("US$ 7", 7.0),
        ("12 EUR", 12.0),
        ("1,000,000", 1e6),
        ("0", 0.0),
        (3, 3.0),
        (0.25, 0.25),
        (Decimal("9.75"), 9.75),
        ("1e-3", 0.001),
    ],
)
def test_prices(value: object, price: float) -> None:
    assert parse_price(value) == (price, None)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, None),
        ("", None),
        ("  ", None),
        ("$5 - $10", "a range"),
        ("$5.00 - $1,000.00", "a range"),
        ("5 to 10", "a range"),
        ("-3", "negative"),
        (-0.5, "negative"),
        ("nan", "not finite"),
        (float("inf"), "not finite"),
        (float("nan"), "not finite"),
        ("1,29", "not a number"),
        ("free", "not a number"),
        (".a-box-inner{background-color:#fff}", "not a number"),
        (True, "not a number"),
        ([5], "not a number"),
    ],
)
def test_invalid_price_is_missing_with_a_reason(value: object, fault: str | None) -> None:
    assert parse_price(value) == (None, fault)


def test_missing_prices_are_counted_with_examples() -> None:
    tally = Tally()
    for n in range(9):
        assert read_price("$5 - $10", f"i{n}", tally) is None
    assert read_price("", "j", tally) is None
    assert tally.counts == {"prices treated as missing: a range": 9}
    assert tally.examples["prices treated as missing: a range"][0] == "'$5 - $10' of item i0"
    assert len(tally.examples["prices treated as missing: a range"]) == 5


def test_text_is_cleaned() -> None:
    assert clean_text("Mug &amp;amp; lid&nbsp;<br/>\n\t<span class='x'>5 < 6</span>\ud800") == "Mug & lid 5 < 6 ?"
    assert compose_text("  ", ["<b></b>"], None) is None
