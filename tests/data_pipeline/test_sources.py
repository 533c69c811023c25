"""A folder and everything that can be made of it give the same corpus; what is skipped is named."""

import gzip
import io
import json
import os
import shutil
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.build import archives, build, listing
from data_pipeline.build.sources import FILE_BYTES, list_source, read_entry, readable_root
from data_pipeline.build.unit_worker import Limits
from data_pipeline.errors import InvalidMidi, UserError
from data_pipeline.midi import midi_bytes
from data_pipeline.shards import TokenShards, load_manifest, rejections
from tests.corpora import random_performance

ALL = {"workers": 1, "filters": "none", "dedup": "none", "val_fraction": 0.0}
NAMES = ("a.mid", "b/a.kar", "b/É.midi", "b-c/x.MID", "b/z/deep.rmi", "b.mid", "zipped.mid.gz")
ODD_NAME = "Pr\udce9lude.mid"  # Latin-1 bytes


def listed(source, tmp_path, max_bytes=FILE_BYTES):
    """Path to bytes, or to why it cannot be read; in the order of the listing."""
    work = tmp_path / f"work-{len(list(tmp_path.iterdir()))}"
    work.mkdir()
    entries = list(list_source(source, work / "spool", work / "tables"))
    root = readable_root(source, work / "spool")
    assert {path.name for path in work.iterdir()} <= {"spool", "tables"}

    def content(entry):
        try:
            return read_entry(root, entry, max_bytes)
        except InvalidMidi as error:
            return error.reason

    assert [os.fsencode(e.path) for e in entries] == sorted(os.fsencode(e.path) for e in entries)
    return {entry.path: content(entry) for entry in entries}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, rng = tmp_path_factory.mktemp("midi"), np.random.default_rng(0)
    for name in NAMES:
        (made / name).parent.mkdir(exist_ok=True, parents=True)
        data = midi_bytes(random_performance(rng, 30))
        (made / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (made / "cut.mid").write_bytes((made / "a.mid").read_bytes()[:60])
    (made / "._a.mid").write_bytes(b"a fork of macOS")
    (made / "notes.txt").write_text("no music")
    rows = [{"path": name, "composer": "Bach", "title": name} for name in NAMES]
    (made / "metadata.json").write_text(json.dumps(rows))
    return made


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def as_tar(folder, path, mode):
    with tarfile.open(path, mode) as archive:
        archive.add(folder, arcname=".")
    return path


def as_zip(folder, path, method=zipfile.ZIP_DEFLATED, **options):
    with zipfile.ZipFile(path, "w", method, **options) as archive:
        for file in reversed(files_of(folder)):
            archive.write(file, file.relative_to(folder))
    return path


def as_parquet(folder, path, *, struct_column=False):
    files = [f for f in files_of(folder) if listing.is_midi_name(f.name)]
    names = [str(f.relative_to(folder)) for f in files][::-1]
    data = [f.read_bytes() for f in files][::-1]
    labels = {row["path"]: row for row in json.loads((folder / "metadata.json").read_text())}
    columns = {
        name: [labels.get(n, {}).get(name) for n in names] for name in ("composer", "title")
    } | {"tempo": [1.5] * len(names)}
    if struct_column:
        midi = {"midi": [{"bytes": d, "path": n} for d, n in zip(data, names, strict=True)]}
    else:
        midi = {"midi": data, "path": names}
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({**midi, **columns}), path, row_group_size=3)
    return path


MAKERS = {
    "tar": lambda f, to: as_tar(f, to / "m.tar", "w"),
    "tar.gz": lambda f, to: as_tar(f, to / "m.tar.gz", "w:gz"),
    "tar.bz2": lambda f, to: as_tar(f, to / "m.tbz", "w:bz2"),
    "tar.xz": lambda f, to: as_tar(f, to / "m.tar.xz", "w:xz"),
    "gnu": lambda f, to: as_tar(f, to / "no-suffix", "w"),
    "zip": lambda f, to: as_zip(f, to / "m.zip"),
    "stored": lambda f, to: as_zip(f, to / "archive", zipfile.ZIP_STORED),
    "bzip2": lambda f, to: as_zip(f, to / "m.zip", zipfile.ZIP_BZIP2),
    "parquet": lambda f, to: as_parquet(f, to / "m.parquet"),
    "structs": lambda f, to: as_parquet(f, to / "hub" / "m.parquet", struct_column=True).parent,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_source_has_the_listing_of_the_folder(folder, tmp_path, kind):
    found = listed(MAKERS[kind](folder, tmp_path), tmp_path)
    assert list(found.items()) == list(listed(folder, tmp_path).items())


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "data"
    summary = build(folder, out, **ALL)
    assert (summary.n_files, summary.n_accepted, summary.n_rejected) == (8, 7, 1)
    return {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.mark.parametrize("kind", ["tar.xz", "zip", "structs"])
def test_every_source_gives_the_corpus_of_the_folder(folder, built, tmp_path, kind):
    """In place, unpacked, and with labels of its own."""
    build(MAKERS[kind](folder, tmp_path), tmp_path / "data", **ALL)
    made = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert made == built


def test_a_compressed_file_is_the_piece_in_it(folder, tmp_path):
    found = listed(folder, tmp_path)
    assert found["zipped.mid.gz"] == gzip.decompress((folder / "zipped.mid.gz").read_bytes())


@pytest.mark.parametrize("name", ["zipped.mid.gz", "b/É.midi"])
def test_one_file_is_a_source(folder, tmp_path, name):
    summary = build(folder / name, tmp_path / "data", **ALL)
    assert (summary.n_files, summary.n_accepted) == (1, 1)
    assert TokenShards(tmp_path / "data", "train")[0].meta["path"] == name.rpartition("/")[2]


def linked(folder):
    """Links of every kind, good and bad; returns what is expected of them."""
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "one.mid").write_bytes(b"one")
    (folder / "other.dat").write_bytes(b"other")
    for name, target in {
        "file.mid": "sub/one.mid",
        "again.mid": "file.mid",
        "sub/up.mid": "../other.dat",
        "folder": "sub",
        "sub/deep": "../more/deepest",
        "through.mid": "folder/deep/../two.mid",
        "sub/top": "..",
        "self.mid": "self.mid",
        "gone.mid": "nowhere.mid",
        "nowhere": "never/there",
        "NEWS.txt": "gone.txt",
        "plain": "other.dat",
    }.items():
        os.symlink(target, folder / name)
    (folder / "more" / "deepest").mkdir(parents=True)
    (folder / "more" / "two.mid").write_bytes(b"two")
    os.link(folder / "sub" / "one.mid", folder / "zz-hard.mid")
    os.link(folder / "other.dat", folder / "hard.mid")
    below = {"one.mid": b"one", "top": "link-loop", "up.mid": b"other"}
    return {
        "again.mid": b"one",
        "file.mid": b"one",
        **{f"folder/{name}": what for name, what in below.items()},
        "gone.mid": "broken-link",
        "hard.mid": b"other",
        "more/two.mid": b"two",
        "nowhere": "broken-link",
        "self.mid": "link-loop",
        **{f"sub/{name}": what for name, what in below.items()},
        "through.mid": b"two",
        "zz-hard.mid": b"one",
    }


def zip_with_links(folder, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for at, _, _ in os.walk(folder):
            for name in os.listdir(at):
                file, inside = (
                    os.path.join(at, name),
                    os.path.relpath(os.path.join(at, name), folder),
                )
                if os.path.islink(file):
                    info = zipfile.ZipInfo(inside)
                    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
                    archive.writestr(info, os.readlink(file))
                else:
                    archive.write(file, inside)
    return path


def test_links_are_followed_and_loops_are_not(tmp_path):
    expected = linked(tmp_path / "midi")
    assert listed(tmp_path / "midi", tmp_path) == expected
    assert listed(as_tar(tmp_path / "midi", tmp_path / "m.tar", "w"), tmp_path) == expected
    assert listed(zip_with_links(tmp_path / "midi", tmp_path / "m.zip"), tmp_path) == expected
    assert listed(as_tar(tmp_path / "midi", tmp_path / "m.tgz", "w:gz"), tmp_path) == expected


def test_linked_folders_elsewhere_are_read_but_not_those_around(tmp_path):
    (tmp_path / "elsewhere" / "x").mkdir(parents=True)
    (tmp_path / "elsewhere" / "x" / "one.mid").write_bytes(b"one")
    (tmp_path / "a" / "midi").mkdir(parents=True)
    for name, target in {"here": "../../elsewhere", "up": "../..", "top": "/"}.items():
        os.symlink(target, tmp_path / "a" / "midi" / name)
    os.symlink("../../a/midi", tmp_path / "elsewhere" / "x" / "back")
    assert listed(tmp_path / "a" / "midi", tmp_path) == {
        "here/x/back": "link-loop", "here/x/one.mid": b"one", "top": "link-loop", "up": "link-loop",
    }  # fmt: skip


def test_of_a_compressed_archive_only_midi_names_are_unpacked(tmp_path):
    (tmp_path / "midi").mkdir()
    (tmp_path / "midi" / "a.dat").write_bytes(b"a")
    os.symlink("a.dat", tmp_path / "midi" / "b.mid")
    assert listed(as_tar(tmp_path / "midi", tmp_path / "m.tar", "w"), tmp_path) == {"b.mid": b"a"}
    packed = as_tar(tmp_path / "midi", tmp_path / "m.tgz", "w:gz")
    assert listed(packed, tmp_path) == {"b.mid": "not-kept"}


def test_a_tar_that_stops_between_two_members_is_told(folder, tmp_path):
    data = as_tar(folder, tmp_path / "m.tar", "w").read_bytes()
    with tarfile.open(tmp_path / "m.tar") as archive:
        at = next(member.offset for member in archive if member.name == "./b.mid")
    (tmp_path / "m.tar").write_bytes(data[:at])
    found = listed(tmp_path / "m.tar", tmp_path)
    assert found.pop("m.tar") == "no-end-of-archive"
    assert len(found) == 5 and "b.mid" not in found
    for cut in (at - 1, at + 1):
        (tmp_path / "m.tar").write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"cut off in member|truncated header"):
            listed(tmp_path / "m.tar", tmp_path)
    (tmp_path / "m.tar").write_bytes(data[:at] + b"?" + data[at + 1 :])
    with pytest.raises(UserError, match=rf"bad checksum at byte {at}"):
        listed(tmp_path / "m.tar", tmp_path)


def test_links_out_of_an_archive_are_named(tmp_path):
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        for name, target in {"a/out.mid": "../../x.mid", "b.mid": "/etc/x.mid", "c": "/srv/midi",
                             "d.mid": "a/../../m.mid"}.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
        info = tarfile.TarInfo("e.mid")
        info.type, info.linkname = tarfile.LNKTYPE, "never.mid"
        archive.addfile(info)
        info = tarfile.TarInfo("fifo.mid")
        info.type = tarfile.FIFOTYPE
        archive.addfile(info)
        info = tarfile.TarInfo("ok.mid")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"ok"))
    outside = dict.fromkeys(("a/out.mid", "b.mid", "c", "d.mid"), "link-outside")
    bad = {**outside, "e.mid": "broken-link", "fifo.mid": "not-a-file"}
    assert listed(tmp_path / "m.tar", tmp_path) == {**bad, "ok.mid": b"ok"}
    with pytest.raises(UserError, match="none of 7 files became a piece"):
        build(tmp_path / "m.tar", tmp_path / "data", **ALL)
    rows = {row["path"]: row for row in rejections(tmp_path / "data")}
    assert rows["b.mid"] == {
        "path": "b.mid", "stage": "list", "reason": "link-outside", "value": "/etc/x.mid",
    }  # fmt: skip


def test_folders_of_links_to_each_other_end(tmp_path, monkeypatch):
    """2 ** 12 ways lead to one file of 12 folders; and a chain deeper than Python recurses."""
    monkeypatch.setattr(listing, "MAX_LINKED_FOLDERS", 100)
    for i in range(12):
        (tmp_path / "midi" / f"d{i}").mkdir(parents=True)
        for name in "ab":
            os.symlink(f"../d{i + 1}", tmp_path / "midi" / f"d{i}" / name)
    os.mkdir(tmp_path / "midi" / "d12")
    (tmp_path / "midi" / "d12" / "x.mid").touch()
    found = listed(tmp_path / "midi", tmp_path)
    assert "too-many-links" in found.values() and len(found) < 500
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a/" * 2000 + "x.mid"))
        archive.addfile(tarfile.TarInfo("b/" * 3000 + "y.mid"))
    found = listed(tmp_path / "m.tar", tmp_path)
    assert found == {"a/" * 2000 + "x.mid": b"", "y.mid": "path-too-long"}


def test_sparse_and_encrypted_and_damaged_members_are_named(tmp_path):
    folder = tmp_path / "midi"
    folder.mkdir()
    for name in ("a.mid", "encrypted.mid", "wrong.mid", "method.mid"):
        (folder / name).write_bytes(name.encode() * 100)
    data = bytearray(as_zip(folder, tmp_path / "m.zip", zipfile.ZIP_STORED).read_bytes())
    central = {name: data.rindex(name) - 46 for name in (b"encrypted.mid", b"method.mid")}
    data[central[b"encrypted.mid"] + 8] |= 1
    data[central[b"method.mid"] + 10] = 99
    data[data.index(b"wrong.mid" * 2) + 100] ^= 1
    (tmp_path / "m.zip").write_bytes(data)
    assert listed(tmp_path / "m.zip", tmp_path) == {
        "a.mid": b"a.mid" * 100, "encrypted.mid": "encrypted", "method.mid": "unknown-compression",
        "wrong.mid": "damaged",
    }  # fmt: skip
    if shutil.which("tar"):
        with (tmp_path / "holes.mid").open("wb") as file:
            file.seek(1 << 20)
            file.write(b"MThd")
        os.system(f"cd {tmp_path} && tar -c --sparse -f s.tar holes.mid")
        with tarfile.open(tmp_path / "s.tar") as archive:
            sparse = next(iter(archive)).issparse()
        if sparse:
            assert listed(tmp_path / "s.tar", tmp_path) == {"holes.mid": "sparse-member"}


def test_a_few_bytes_do_not_become_many(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FILE_BYTES", 1000)
    folder = tmp_path / "midi"
    folder.mkdir()
    (folder / "a.mid.gz").write_bytes(gzip.compress(bytes(100_000)))
    (folder / "b.mid").write_bytes(bytes(100_000))
    packed = as_tar(folder, tmp_path / "m.tgz", "w:gz")
    for source in (folder, as_zip(folder, tmp_path / "m.zip"), packed):
        found = listed(source, tmp_path, max_bytes=1000)
        assert found["a.mid.gz"] == "too-large"
        # What is not even unpacked is known to be too large before it is read.
        assert found["b.mid"] == "not-kept" if source == packed else "too-large"
    with pytest.raises(UserError, match=r"\(read/too-large 2\)"):
        build(packed, tmp_path / "data", limits=Limits(file_bytes=1000), **ALL)
    rows = {r["path"]: (r["stage"], r["reason"]) for r in rejections(tmp_path / "data")}
    assert rows == dict.fromkeys(("a.mid.gz", "b.mid"), ("read", "too-large"))
    data = bytearray((tmp_path / "m.zip").read_bytes())
    at = data.rindex(b"b.mid") - 46
    data[at + 24 : at + 28] = struct.pack("<L", 100)  # unpacks to more than it says
    (tmp_path / "m.zip").write_bytes(data)
    assert listed(tmp_path / "m.zip", tmp_path)["b.mid"] == "damaged"


def test_zip64_and_something_before_the_archive(folder, tmp_path):
    expected = listed(folder, tmp_path)
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        for file in files_of(folder):
            with archive.open(str(file.relative_to(folder)), "w", force_zip64=True) as member:
                member.write(file.read_bytes())
    plain = (tmp_path / "m.zip").read_bytes()
    assert listed(tmp_path / "m.zip", tmp_path) == expected
    (tmp_path / "m.zip").write_bytes(b"#!/bin/sh\n" + plain)
    assert listed(tmp_path / "m.zip", tmp_path) == expected
    # The end record of an archive of over 65,535 members or 4 GB is found through a second one.
    at = plain.rindex(b"PK\5\6")
    count, size, offset = struct.unpack_from("<HLL", plain, at + 10)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 2)
    for before in (b"", b"before"):
        (tmp_path / "m.zip").write_bytes(before + plain[:at] + record + locator + end + b"hi")
        assert listed(tmp_path / "m.zip", tmp_path) == expected


def renamed(data, old, new, system, flags):
    """A zip whose member `old` has another name of as many bytes."""
    data = bytearray(data.replace(old, new))
    for sign, at in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        record = data.index(sign)
        data[record + at + 1] = flags >> 8
    data[data.index(b"PK\1\2") + 5] = system
    return bytes(data)


@pytest.mark.parametrize(
    "raw, system, flags, name",
    [
        ("Prélude.mid".encode("cp437"), 0, 0, "Prélude.mid"),
        ("Prélude.mid".encode("latin1"), 3, 0, ODD_NAME),
        ("Pr\u00e9lude.mid".encode(), 0, 1 << 11, "Prélude.mid"),
        ("Pre\u0301lude.mid".encode(), 3, 0, "Pre\u0301lude.mid"),
        (b"a\\b\\x.mid", 0, 0, "a/b/x.mid"),
        (b"./a//b/x.mid", 3, 0, "a/b/x.mid"),
    ],
)
def test_names_in_zips_are_those_that_unpacking_gives(tmp_path, raw, system, flags, name):
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("?" * len(raw), b"content")
    data = (tmp_path / "m.zip").read_bytes()
    (tmp_path / "m.zip").write_bytes(renamed(data, b"?" * len(raw), raw, system, flags))
    assert listed(tmp_path / "m.zip", tmp_path) == {name: b"content"}


def test_names_that_are_not_utf8_are_built_from_every_source(folder, tmp_path):
    midi = tmp_path / "midi"
    midi.mkdir()
    data = (folder / "a.mid").read_bytes()
    (midi / ODD_NAME).write_bytes(data)
    tar = as_tar(midi, tmp_path / "m.tar", "w")
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("Pr?lude.mid", data)
    raw = renamed((tmp_path / "m.zip").read_bytes(), b"Pr?lude", b"Pr\xe9lude", 3, 0)
    (tmp_path / "m.zip").write_bytes(raw)
    for source in (midi, tar, tmp_path / "m.zip"):
        assert listed(source, tmp_path) == {ODD_NAME: data}
    build(tmp_path / "m.zip", tmp_path / "data", **ALL)
    (piece,) = TokenShards(tmp_path / "data", "train")
    assert piece.meta["path"] == "Pr\ufffdlude.mid"


def test_the_table_in_a_zip_is_read(folder, tmp_path):
    """As MAESTRO ships: one folder with a table whose paths begin below it; here names are NFD."""
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        for name in ("É.mid", "metadata.csv"):
            csv = b'path,composer\n"E\xcc\x81.mid",Chopin\n'
            data = csv if name.endswith("csv") else (folder / "a.mid").read_bytes()
            archive.writestr(f"maestro/{name}", data)
    build(tmp_path / "m.zip", tmp_path / "data", **ALL)
    (piece,) = TokenShards(tmp_path / "data", "train")
    assert piece.meta["labels"] == {"composer": "chopin"}


def test_parquet_in_a_folder_that_is_not_utf8(folder, tmp_path):
    (tmp_path / "Caf\udce9").mkdir()
    source = shutil.copy(as_parquet(folder, tmp_path / "m.parquet"), tmp_path / "Caf\udce9")
    assert listed(Path(source), tmp_path) == listed(folder, tmp_path)


def test_parquet_as_hubs_ship_it(folder, tmp_path):
    """A file a split, ClassLabels by number, rows without a name or without bytes."""
    files = [(folder / name).read_bytes() for name in ("a.mid", "b.mid", "cut.mid")]
    hub, names = tmp_path / "hub" / "data", ["bach", "liszt"]
    hub.mkdir(parents=True)
    features = {"who": {"names": names, "_type": "ClassLabel"}, "midi": {"_type": "Value"}}
    for split, rows in (("train", files), ("test", files[:1])):
        midi = [{"bytes": data, "path": None} for data in rows] + [{"bytes": None, "path": "x.wav"}]
        table = pa.table({"midi": midi, "who": [1] * len(midi), "n": [None] * len(midi)})
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(metadata), hub / f"{split}-00000-of-1.parquet")
    summary = build(tmp_path / "hub", tmp_path / "data", **ALL)
    reasons = {row["path"]: row["reason"] for row in rejections(tmp_path / "data")}
    assert reasons == {
        "x.wav.mid": "no-bytes",
        "data/train-00000-of-1/x.wav.mid": "no-bytes",
        "data/train-00000-of-1/000002.mid": "truncated",
    }
    assert (summary.n_train, summary.n_test) == (len(files) - 1, 1)
    (piece,) = TokenShards(tmp_path / "data", "test")
    assert piece.meta["path"] == "data/test-00000-of-1/000000.mid"
    assert piece.meta["labels"] == {"who": "liszt", "split": "test"}
    assert load_manifest(tmp_path / "data")["published_split"]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"x": [1]}, "no column of MIDI bytes among x"),
        ({"x": [b"1"], "y": [b"1"]}, r"several columns \(x, y\) of MIDI bytes"),
        ({"audio": [b"1"], "midi_1": [b""], "midi_2": [b""]}, r"several columns \(audio, midi_1"),
    ],
)
def test_parquet_without_a_column_of_midi_is_explained(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    with pytest.raises(UserError, match=message):
        build(tmp_path / "m.parquet", tmp_path / "data", **ALL)


def broken(folder, tmp_path):
    """Archives that were cut off or are none."""
    for kind, source in (
        (kind, MAKERS[kind](folder, tmp_path)) for kind in MAKERS if kind != "structs"
    ):
        data = source.read_bytes()
        yield f"{kind}-cut", data[: len(data) * 2 // 3 - 5], source.suffix
    noise = np.random.default_rng(0).bytes(3000)
    for magic in (b"PK\3\4", b"PAR1", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"", b"PK\5\6"):
        yield f"noise-{magic[:2].hex()}", magic + noise, ""
    yield "empty", b"", ".zip"
    info = tarfile.TarInfo("x.mid")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 11 + b"\x00"  # minus 256 bytes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    yield "backwards", bytes(header) + bytes(10240), ".tar"


def test_unreadable_archives_name_themselves(folder, tmp_path):
    for name, data, suffix in broken(folder, tmp_path):
        source = tmp_path / f"broken-{name}{suffix}"
        source.write_bytes(data)
        with pytest.raises(UserError) as error:
            build(source, tmp_path / f"data-{name}", **ALL)
        text = str(error.value)
        assert source.name in text and "\n" not in text and "data-" not in text, name


def test_unreadable_folders_name_themselves(folder, tmp_path, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).rstrip("/").endswith(("midi/b", "closed")):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    shutil.copytree(folder, tmp_path / "midi")
    monkeypatch.setattr(os, "scandir", refusing)
    build(tmp_path / "midi", tmp_path / "data", **ALL)
    rows = {row["path"]: (row["stage"], row["reason"], row["value"]) for row in
            rejections(tmp_path / "data")}  # fmt: skip
    assert rows["b"] == ("list", "unreadable-folder", "Permission denied")
    (tmp_path / "closed").mkdir()
    with pytest.raises(UserError, match=r"closed: cannot read this folder \(Permission denied\)"):
        build(tmp_path / "closed", tmp_path / "other", **ALL)
