"""Given tracks come out as they went in, in their time; nothing else is written on them."""

from dataclasses import replace

import jax.numpy as jnp
import mido
import numpy as np
import pytest

from aria_jax.generate.continuation import Continuation, continue_prompt
from aria_jax.generate.decoding import Decoding
from aria_jax.generate.given import PLAYERS, GivenTracks, given_tracks
from aria_jax.generate.sampler import Greedy, Temperature
from aria_jax.generate.weights import decoder_weights
from data_pipeline.errors import UserError
from data_pipeline.midi import midi_bytes, note_programs, read_midi
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.vocabulary import Kind
from tests.marks import slow_among

ARIA = Tokenizer.preset("aria")
SETTINGS = Decoding(max_tokens=400, sampler=Temperature(temperature=1.0), chunk=400)


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    """12 s: a piano's melody and its chords, a bass, a nameless track of strings, and drums."""
    midi = mido.MidiFile(ticks_per_beat=500)
    tempo = mido.MidiTrack([mido.MetaMessage("track_name", name="tempo")])
    midi.tracks.append(tempo)
    tracks = (
        ("Melody", 0, 0, [(i * 750, 700, 72 + i % 7, 90) for i in range(16)]),
        ("chords", 1, 0, [(i * 1500, 1400, p, 60) for i in range(8) for p in (48, 55, 64)]),
        ("Bass, low", 2, 33, [(i * 1500, 900, 36 + i, 80) for i in range(8)]),
        ("", 3, 48, [(i * 3000, 2900, 67, 50) for i in range(4)]),
        ("kit", 9, 0, [(i * 500, 0, 36 + 2 * (i % 2), 100) for i in range(24)]),
    )
    for name, channel, program, notes in tracks:
        track = mido.MidiTrack([mido.Message("program_change", channel=channel, program=program)])
        if name:
            track.insert(0, mido.MetaMessage("track_name", name=name))
        events = [(s, "note_on", p, v) for s, _, p, v in notes]
        events += [(s + n, "note_off", p, 0) for s, n, p, _ in notes]
        now = 0
        for tick, kind, pitch, velocity in sorted(events, key=lambda e: (e[0], e[1] != "note_off")):
            track.append(
                mido.Message(kind, channel=channel, note=pitch, velocity=velocity, time=tick - now)
            )
            now = tick
        midi.tracks.append(track)
    path = tmp_path_factory.mktemp("song") / "song.mid"
    midi.save(path)
    return path


@pytest.fixture(scope="module")
def weights(random_model):
    """A random model that likes three keys of each instrument, short waits, and `<T>`."""
    model = random_model(n_layers=1)
    model.backbone.norm_bias[...] = jnp.zeros(16).at[0].set(1.0)
    liked = np.where(ARIA.onset_ms >= 0, -ARIA.onset_ms / 500, 0)
    liked[ARIA.time_id] = 9
    for i in range(len(PLAYERS)):
        keys = (ARIA.instrument == i) & np.isin(ARIA.pitch, (50, 51, 72))
        liked[keys & ((ARIA.velocity == 60) | (ARIA.kind == Kind.DRUM))] = 8
    model.head[...] = model.head[...].at[0].set(liked)
    return decoder_weights(model)


def accompanied(weights, song, *names, **options) -> tuple[GivenTracks, list[Continuation]]:
    options = {"seconds": 2.0} | options
    given = given_tracks(song, ARIA, names, **options)
    made = continue_prompt(weights, ARIA, given.prompt, n=2, seed=0, settings=SETTINGS, given=given)
    return given, made


def heard(performance):
    """(instrument, pitch, velocity, start, end), sorted."""
    family = np.where(performance.notes["channel"] == 9, 16, note_programs(performance) // 8)
    columns = (performance.notes[name].tolist() for name in ("pitch", "velocity", "start", "end"))
    return sorted(zip(family.tolist(), *columns, strict=True))


def of_tracks(song, *numbers):
    """The same of tracks of the file, as tokens have them."""
    return heard(ARIA.decode(ARIA.encode(read_midi(song, of_tracks=numbers))))


CASES = {
    "one of two pianos": (["melody"], (1,), {"piano", "bass", "ensemble", "drum"}),
    "several": (["MELODY", "Bass, low"], (1, 3), {"piano", "ensemble", "drum"}),
    "drums": (["drums"], (5,), {"piano", "bass", "ensemble"}),
    "an instrument": (["piano"], (1, 2), {"bass", "ensemble", "drum"}),
    "a nameless track": (["track 5", "kit"], (4, 5), {"piano", "bass"}),
    "all but one": (["piano", "bass", "drum"], (1, 2, 3, 5), {"ensemble"}),
}


@pytest.mark.parametrize("case", slow_among(CASES, {"several", "an instrument"}))
def test_given_tracks_come_whole_and_in_their_time(case, weights, song):
    names, numbers, plays = CASES[case]
    given, made = accompanied(weights, song, *names)
    assert {PLAYERS[i] for i in given.players} == plays
    for one in made:
        theirs, others = given.performances(ARIA, one.ids)
        assert heard(theirs) == of_tracks(song, *numbers)
        is_given = given.is_given(ARIA, one.ids)[len(given.prompt) :]
        np.testing.assert_array_equal(one.ids[is_given], given.ids[:-1])
        onsets = ARIA.events(np.concatenate([given.prompt, one.ids]))[1]
        assert (np.diff(onsets) >= 0).all()
        begins = np.isin(ARIA.kind[one.ids], (Kind.NOTE, Kind.DRUM)) & ~is_given
        assert {PLAYERS[i] for i in ARIA.instrument[one.ids[begins]]} <= plays
        assert one.ids[-1] == ARIA.eos_id and not one.ended and ARIA.dim_id not in one.ids
        assert len(one.full.notes) == len(theirs.notes) + len(others.notes)
        written = read_midi(midi_bytes(one.full))  # nothing the model writes shortens what is given
        assert not set(of_tracks(song, *numbers)) - set(heard(written))
        assert one.n_notes == begins.sum() > 5


def test_an_accompaniment_from_the_first_note_of_a_melody_alone(weights, song):
    """Nothing else is in the file; drums begin where the melody does."""
    melody = read_midi(song, of_tracks=(1,))
    with pytest.raises(UserError, match=r"nothing but piano plays in it.*--play piano bass"):
        given_tracks(melody, ARIA, ["piano"], seconds=0)
    given, (one, _) = accompanied(weights, melody, "piano", seconds=0, play=["drums"])
    assert [ARIA.tokens[i] for i in given.prompt] == [
        ("prefix", "instrument", "piano"), ("prefix", "instrument", "drum"), "<S>"]  # fmt: skip
    theirs, others = given.performances(ARIA, one.ids)
    assert heard(theirs) == of_tracks(song, 1)
    assert len(others.notes) == one.n_notes > 0 and set(others.notes["channel"]) == {9}
    assert others.notes["start"].max() <= theirs.notes["end"].max()


def test_the_model_is_asked_what_it_would_write_anyway(weights, song):
    """Where the given track is far away, nothing is changed by it."""
    notes = read_midi(song)
    late = notes.notes.copy()
    late["start"][late["channel"] == 9] += 60_000
    late["end"][late["channel"] == 9] += 60_000
    notes = replace(notes, notes=late[np.argsort(late["start"], kind="stable")])
    given = given_tracks(notes, ARIA, ["drum"], seconds=2.0)
    # What is drawn hangs on the probabilities of all ids, the likeliest does not.
    settings = Decoding(max_tokens=60, sampler=Greedy(), chunk=60)
    (one,), (free,) = (
        continue_prompt(weights, ARIA, given.prompt, n=1, seed=0, settings=settings, given=tracks)
        for tracks in (given, None)
    )
    drums = np.flatnonzero(ARIA.kind[free.ids] == Kind.DRUM)  # which the model may not write here
    minute = np.flatnonzero(free.ids == ARIA.time_id)[11:]  # when the drums that are given begin
    stop = min([*drums, *minute, 60])
    assert stop > 5
    np.testing.assert_array_equal(one.ids[:stop], free.ids[:stop])


@pytest.mark.slow
def test_sliding_goes_on_with_what_is_given(random_model, song):
    weights = decoder_weights(random_model(n_layers=1, max_seq_len=128))
    given = given_tracks(song, ARIA, ["melody", "chords", "bass", "kit"], seconds=1.0)
    settings = replace(SETTINGS, sliding=True, chunk=32)
    (one,) = continue_prompt(
        weights, ARIA, given.prompt, n=1, seed=0, settings=settings, given=given
    )
    is_given = given.is_given(ARIA, one.ids)[len(given.prompt) :]
    assert is_given.any()
    np.testing.assert_array_equal(one.ids[is_given], given.ids[: is_given.sum()])


def test_mistakes_name_what_there_is(song):
    tracks = "Melody, chords, Bass, low, track 5, kit"
    there = f"its tracks are {tracks}, its instruments piano, bass, ensemble, drum"
    with pytest.raises(UserError, match=f"no track or instrument 'oboe'; {there}"):
        given_tracks(song, ARIA, ["oboe"], seconds=2)
    with pytest.raises(UserError, match="no instrument 'oboe': there are piano, organ"):
        given_tracks(song, ARIA, ["melody"], play=["oboe"], seconds=2)
    with pytest.raises(UserError, match=r"nothing but .* plays in it"):
        given_tracks(song, ARIA, ["piano", "bass", "track 5", "kit"], seconds=2)
    with pytest.raises(UserError, match=r"no note of Melody comes after .* 11\.\d s: shorten it"):
        given_tracks(song, ARIA, ["melody"], seconds=20)
    with pytest.raises(UserError, match="pedal has the piano only"):
        given_tracks(song, Tokenizer.preset("pedal"), ["melody"], seconds=2)
    with pytest.raises(UserError, match="takes the tokens of aria"):
        given_tracks(song, Tokenizer.preset("musenet"), ["melody"], seconds=2)
