"""What comes back is what was saved, or an error that tells damage from everything else."""

import json
import os
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aria_jax.checkpoints.manager import Checkpointer, DamagedCheckpoint, checksums
from aria_jax.config import MeshConfig
from aria_jax.sharding import batch_sharding, make_mesh, replicated
from data_pipeline.errors import UserError

PARAMS = {"w": jnp.arange(24.0).reshape(8, 3), "b": jnp.ones(3)}
RECORD = {"model": {"d": 3}, "position": {"step": 0, "seed": 0}}


def like(params=PARAMS, dtype=None, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding), params
    )


def write(folder, *steps, **options):
    checkpointer = Checkpointer(folder, **options)
    for step in steps:
        params = jax.tree.map(lambda x, step=step: x + step, PARAMS)
        record = {**RECORD, "position": {"step": step, "seed": 0}}
        checkpointer.save(step, params, record, opt_state=(params, jnp.int32(step)))
    checkpointer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    write(folder, 2, 4)
    return folder


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def read(checkpointer, step, sharding=None):
    opt_state = like((PARAMS, jnp.int32(0)), sharding=sharding)
    return (
        checkpointer.record(step),
        checkpointer.restore(step, "params", like(sharding=sharding)),
        checkpointer.restore(step, "opt_state", opt_state),
    )


def newest(folder, **options):
    checkpointer = Checkpointer(folder, **options)
    try:
        return checkpointer.newest(lambda step: read(checkpointer, step))
    finally:
        checkpointer.close()


def folders(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def flip(data, place):
    changed = bytearray(data)
    changed[place] ^= 0x10
    return bytes(changed)


DAMAGE = {
    "flipped": lambda data: flip(data, len(data) // 2),
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "missing": lambda data: None,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_no_damage_to_any_file_changes_what_is_read(saved, workdir, kind):
    (record, params, opt_state), step = newest(saved)[1], workdir / "checkpoints" / "4"
    found = 0
    for path in sorted(p for p in step.rglob("*") if p.is_file()):
        data = path.read_bytes()
        damaged = DAMAGE[kind](data)
        path.unlink() if damaged is None else path.write_bytes(damaged)
        checkpointer = Checkpointer(workdir, read_only=True)
        try:
            again = read(checkpointer, 4)
        except DamagedCheckpoint:
            found += 1
        else:  # a file that nothing reads
            assert again[0] == record
            jax.tree.map(np.testing.assert_array_equal, again[1:], (params, opt_state))
        checkpointer.close()
        path.write_bytes(data)
    assert found >= 5  # the record; arrays and their index of each item


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_changes_what_is_read(saved, tmp_path_factory, data):
    workdir = shutil.copytree(saved, tmp_path_factory.mktemp("flipped") / "run")
    files = sorted(p for p in (workdir / "checkpoints/4").rglob("*") if p.stat().st_size > 100)
    path = data.draw(st.sampled_from([file for file in files if file.is_file()]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(content))
    checkpointer = Checkpointer(workdir, read_only=True)
    try:
        found = checkpointer.restore(4, "params", like())
    except DamagedCheckpoint:
        return
    finally:
        checkpointer.close()
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + 4), found, PARAMS)


@pytest.mark.parametrize("at", [4, 12, 14, 20])
def test_a_header_that_cannot_be_decoded_is_damage(workdir, at):
    """Compressed bytes begin there, of which TensorStore complains without a code."""
    found = 0
    for path in sorted((workdir / "checkpoints/4/params").rglob("d/*")):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        checkpointer = Checkpointer(workdir, read_only=True)
        try:
            checkpointer.restore(4, "params", like())
        except DamagedCheckpoint:
            found += 1
        finally:
            checkpointer.close()
        data[at] ^= 1
        path.write_bytes(data)
    assert found


def damage(workdir, step, item="params"):
    for path in (workdir / "checkpoints" / str(step) / item).rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


@pytest.mark.parametrize("item", ["params", "opt_state", "record"])
def test_a_damaged_step_is_kept_aside_and_its_number_saved_again(workdir, item):
    damage(workdir, 4, item)
    with pytest.warns(UserWarning) as told:
        step, (record, _, _) = newest(workdir)
    assert (step, record["position"]["step"]) == (2, 2)
    text = "\n".join(str(warning.message) for warning in told)
    assert "checkpoint 4 is damaged" in text and "kept as" in text and "4.damaged" in text
    assert folders(workdir) == ["2", "4.damaged"]

    write(workdir, 4, keep=1)
    assert newest(workdir)[0] == 4
    damage(workdir, 4, item)
    write(workdir, 5, keep=1)
    assert folders(workdir) == ["4.damaged", "5"], "what is aside is neither counted nor removed"


def test_a_second_damage_to_a_step_gets_a_name_of_its_own(workdir):
    for _ in range(2):
        damage(workdir, 4)
        with pytest.warns(UserWarning):
            newest(workdir)
        write(workdir, 4)
    assert folders(workdir) == ["2", "4", "4.damaged", "4.damaged-2"]


def test_who_only_reads_changes_nothing(workdir):
    damage(workdir, 4)
    with pytest.warns(UserWarning, match="checkpoint 4 is damaged"):
        assert newest(workdir, read_only=True)[0] == 2
    assert folders(workdir) == ["2", "4"]


def test_where_all_are_damaged_none_is_renamed(workdir):
    damage(workdir, 2)
    damage(workdir, 4)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no checkpoint here can be"):
        newest(workdir)
    assert folders(workdir) == ["2", "4"]


def test_a_step_without_its_record_is_damaged(workdir):
    shutil.rmtree(workdir / "checkpoints/4/record")
    with pytest.warns(UserWarning, match="checkpoint 4 is damaged"):
        assert newest(workdir)[0] == 2


@pytest.mark.parametrize(
    "error, message",
    [
        (MemoryError("no room"), "not enough memory"),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "not enough memory"),
        (PermissionError(13, "Permission denied"), "no permission"),
        (ValueError("PERMISSION_DENIED: Error reading local file"), "no permission"),
        (ConnectionResetError(104, "Connection reset by peer"), "cannot be read now"),
        (OSError(5, "Input/output error"), "cannot be read now"),
        (ValueError("UNAVAILABLE: connection timed out"), "cannot be read now"),
        (ValueError("a fault of the program"), "a fault of the program"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_other_errors_are_no_damage(workdir, monkeypatch, error, message, wrapped):
    known = message != str(error)

    def fail(*args, **kwargs):
        if wrapped and known:  # as Orbax does
            raise Exception("Encountered error. See full TensorStore details: …") from error
        raise error

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Exception, match=message) as raised:
            newest(workdir)
    if known:
        assert isinstance(raised.value, UserError)
        assert str(workdir / "checkpoints" / "4") in str(raised.value)
    assert not isinstance(raised.value, DamagedCheckpoint)
    assert folders(workdir) == ["2", "4"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_no_damage(workdir):
    for path in (workdir / "checkpoints/4").rglob("*"):
        if path.is_file():
            path.chmod(0)
    with pytest.raises(UserError, match="no permission"):
        newest(workdir)
    assert folders(workdir) == ["2", "4"]


def test_other_shapes_are_named_and_no_damage(workdir):
    checkpointer = Checkpointer(workdir)
    other = {"w": jnp.zeros((8, 4)), "c": jnp.zeros(3)}
    with pytest.raises(UserError) as error:
        checkpointer.newest(lambda step: checkpointer.restore(step, "params", like(other)))
    checkpointer.close()
    message = str(error.value)
    assert "w is (8, 3) there and (8, 4) here" in message
    assert "b is (3,) there and unknown here" in message
    assert "c is missing there and (3,) here" in message
    assert not isinstance(error.value, DamagedCheckpoint)


def test_a_folder_of_another_step_is_an_error(workdir):
    (workdir / "checkpoints/4").rename(workdir / "checkpoints/7")
    with pytest.raises(UserError, match="7 is of step 4, by its record"):
        newest(workdir)


def test_records_without_checksums_are_still_read(workdir):
    path = workdir / "checkpoints/4/record/metadata"
    record = json.loads(path.read_text())
    assert re.fullmatch("[0-9a-f]{64}", record.pop("digest")) and record.pop("arrays")
    path.write_text(json.dumps(record))
    assert newest(workdir)[0] == 4
    checkpointer = Checkpointer(workdir, read_only=True)
    with pytest.raises(UserError, match=r"w is \(8, 3\) there"):
        checkpointer.restore(4, "params", like({**PARAMS, "w": jnp.zeros((8, 4))}))
    checkpointer.close()


def test_arrays_come_in_the_type_that_is_asked_for(workdir):
    checkpointer = Checkpointer(workdir)
    found = checkpointer.restore(4, "params", like(dtype=jnp.bfloat16))
    checkpointer.close()
    expected = jax.tree.map(lambda x: (x + 4).astype(jnp.bfloat16), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_step_that_would_be_lost_behind_a_later_one_is_an_error(workdir):
    with pytest.raises(UserError, match="step 3 is not saved behind step 4"):
        write(workdir, 3)


@pytest.mark.parametrize(
    "dtype, shape",
    [(jnp.float32, (8, 6)), (jnp.bfloat16, (8, 6)), (jnp.int8, (48,)), (jnp.float32, (8, 2, 3))],
)
def test_checksums_see_every_element_and_no_sharding(dtype, shape):
    x = np.arange(48).reshape(shape).astype(dtype)
    mesh = make_mesh(MeshConfig(2, 4), jax.devices()[:8])
    sums = {
        checksums(jax.device_put(x, place))[0]
        for place in (jax.devices()[0], replicated(mesh), batch_sharding(mesh))
    }
    assert len(sums) == 1
    for place in np.ndindex(x.shape):
        other = x.copy()
        other[place] += 1
        sums.add(checksums(jnp.asarray(other))[0])
    assert len(sums) == 1 + x.size
    assert checksums(jnp.asarray(x[::-1]))[0] not in sums
