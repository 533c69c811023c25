"""Schedules are read as the compiler writes them."""

from pathlib import Path

import pytest

from aria_jax.aot.schedule import KERNELS, Region, kernel_time, regions
from aria_jax.kernels.attention.packed import BUSY
from data_pipeline.errors import UserError

LINE = "0x{:x}   : > {{ {} }}\n"
PRODUCT = "%9 = vmatmul.bf16.gmra.mxu0 %v8"
BRANCH = "%7 = sbr.rel (%p1) target = $region16"


def bundles(*parts: tuple[int, int]) -> str:
    """Text of regions of so many bundles, the first few with a product each."""
    text, address = "= comment\n", 0
    for n, products in parts:
        for i in range(n):
            what = [PRODUCT] * (i < products) + [BRANCH] * (i == n - 1)
            text += LINE.format(address, "  ;;  ".join(what))
            address += 1
    return text


def test_regions_lie_between_branches():
    text = bundles((3, 0), (7, 5), (2, 1))
    assert list(regions(text))[:3] == [Region(3, 0), Region(7, 5), Region(2, 1)]


def write(folder: Path, name: str, text: str) -> None:
    (folder / f"17-x_{name}.1-72-final_bundles.txt").write_text(text)
    usage = "== CAPACITY:\nMATMUL, MATPUSH\n    4     4\n== UTILIZATION:\n"
    (folder / f"17-x_{name}.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(usage)


def test_regions_count_as_often_as_they_run(tmp_path):
    # A step of 10 bundles, 600 once a tile; off and on the diagonal, the latter short of products.
    write(tmp_path, "rotary_attention_", bundles((10, 0), (600, 0), (900, 400), (1000, 100)))
    time = kernel_time(tmp_path, "v5e", "forward", tiles=4)
    off, on = 400 * 16 / 4, 1000  # products take longer than their bundles; and the reverse
    assert time.total == pytest.approx(6 * off + 4 * on + 4 * 600 + 10 * 10, abs=10)
    assert time.matrix == 6 * 1600 + 4 * 400


def test_a_missing_or_foreign_schedule_is_said_so(tmp_path):
    with pytest.raises(UserError, match="another version of libtpu"):
        kernel_time(tmp_path, "v5e", "forward", tiles=4)
    write(tmp_path, "rotary_attention_", bundles((10, 0), (600, 0)))
    with pytest.raises(UserError, match="no products"):
        kernel_time(tmp_path, "v5e", "forward", tiles=4)


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v5e:2x2", "v6e:2x2"])
def test_the_kernels_are_as_busy_as_the_cost_estimate_says(topology):
    import subprocess
    import sys

    command = [sys.executable, "-m", "launch.schedule", topology]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "libtpu" in done.stderr:
        pytest.skip(f"needs libtpu (pip install 'aria-jax[aot]'): {done.stderr}")
    rows = [row.split("|") for row in done.stdout.splitlines() if row.startswith(f"| {topology}")]
    assert len(rows) == len(KERNELS)
    for row in rows:
        assert BUSY[row[2].strip()] <= float(row[4].strip(" %")) / 100 < 1
