"""SARI against values of the published metric (Hugging Face's `sari`), and its edges."""

from __future__ import annotations

import pytest

from seekr.sari import sari

SOURCE = "About 95 species are currently accepted ."
REFERENCES = (
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
)
FIXED = [
    (SOURCE, "About 95 you now get in .", REFERENCES, 0.2695360195360195),
    (SOURCE, "About 95 species are now agreed .", REFERENCES, 0.6170965608465607),
    (SOURCE, "About 95 species are currently agreed .", REFERENCES, 0.5088681849551415),
    (
        "Der Bundesrat hat heute, am Mittwoch, neue Massnahmen beschlossen.",
        "Der Bundesrat hat neue Regeln gemacht.",
        ("Der Bundesrat hat neue Regeln beschlossen. Sie gelten ab heute.",),
        0.7059116809116809,
    ),
    ("one two three", "", ("one two",), 0.6527777777777778),
    ("a", "b", ("c",), 0.9166666666666666),
    (
        "The cat, which was black, sat.",
        "The black cat sat sat.",
        ("The cat sat.", "The black cat sat."),
        0.8638680033416876,
    ),
]


@pytest.mark.parametrize(("source", "prediction", "references", "expected"), FIXED)
def test_sari_is_what_the_published_metric_gives(
    source: str, prediction: str, references: tuple[str, ...], expected: float
) -> None:
    assert sari(source, prediction, references) == pytest.approx(expected, abs=1e-12)


def test_a_prediction_that_is_the_only_reference_is_perfect() -> None:
    assert sari(SOURCE, REFERENCES[1], REFERENCES[1:2]) == pytest.approx(1.0)


def test_copying_the_source_is_worse_than_simplifying_as_asked() -> None:
    assert sari(SOURCE, SOURCE, REFERENCES) < sari(SOURCE, REFERENCES[1], REFERENCES)


def test_the_order_of_references_does_not_matter() -> None:
    found = {
        round(sari(SOURCE, "About 95 are known .", order), 12)
        for order in (REFERENCES, REFERENCES[::-1])
    }
    assert len(found) == 1
