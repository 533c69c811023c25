"""What the demo's page says about its own result."""

import pytest

from aria_jax.report.demo import _verdict


def scored(accuracy: float, low: float, high: float) -> dict:
    return {"accuracy": accuracy, "accuracy_ci": (low, high), "n_test": 81}


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        (scored(0.60, 0.5, 0.7), "does not beat"),
        (scored(0.74, 0.7, 0.8), "does not beat"),  # equal is not better
        (scored(0.78, 0.7, 0.8), "81 files do not settle it"),
        (scored(0.90, 0.86, 0.95), "beats the untrained network"),
    ],
)
def test_the_verdict_claims_no_more_than_the_intervals(ours, says):
    assert says in _verdict(ours, untrained=scored(0.74, 0.64, 0.84))
