"""The table itself: every verb is tried often enough, rightly and wrongly."""

import pytest

from aria_jax.cli.main import VERBS
from tests.first_hour import test_files, test_generate, test_models, test_training, test_vectors
from tests.first_hour.uses import Use

ROWS = {
    str(row): row
    for module in (test_files, test_generate, test_models, test_training, test_vectors)
    for table in vars(module).values()
    if isinstance(table, list)
    for row in table
    if isinstance(row, Use)
}

# Right uses that take a smaller training (cli/test_demo.py), or a client (serve/test_serve.py).
ELSEWHERE = {"demo": 2, "serve": 2}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_three_right_and_five_wrong_uses(verb):
    rows = [row for row in ROWS.values() if row.verb == verb]
    right = sum(row.status == 0 for row in rows)
    assert right + ELSEWHERE.get(verb, 0) >= 3 and len(rows) - right >= 5
