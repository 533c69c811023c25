"""Given tracks: their notes come when their time comes, and the model writes the rest.

The model is asked for its next event. Where that would begin no earlier than the next given note,
the given note is put in its place; so the notes of both are in the order in which sequences have
them in training, and the model needs no training of its own. It hears what is given as it comes,
not before. Where the given tracks end, so does the piece.
"""

import io
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from aria_jax.generate.grammar import Expect, Grammar, GrammarState, make_grammar, state_after
from data_pipeline.cleaning import supported_notes
from data_pipeline.errors import InvalidMidi, UserError
from data_pipeline.midi import DRUM_CHANNEL, NOTE, PROGRAM, Performance, note_programs, read_midi
from data_pipeline.tokenizers import Tokenizer, of_aria
from data_pipeline.vocabulary import INSTRUMENT_OF_PROGRAM, INSTRUMENTS, PARTS, SEGMENT_MS, Kind

PLAYERS = (*INSTRUMENTS, "drum")
"""What tokens are played on."""
_ROWS = 256  # tables are padded to multiples of this, so that other songs reuse a compiled loop
_NEVER = np.iinfo(np.int32).max
_MARKED_NOTE = np.dtype([*NOTE.descr, ("given", "?")])


@dataclass(frozen=True, eq=False)
class GivenTracks:
    """A prompt, and the given notes that come after it.

    Attributes:
        names: of what is given, as the file has them.
        prompt: ids int64 [T], of whole notes of all tracks; its prefix says all that plays.
        prompt_is_given_T: bool; tokens of given notes.
        tokens_Gx3: int32, the tokens of each event, -1 behind shorter ones; the last is `<E>`.
        segment_G, onset_G: int32, its 5 s segment, and its onset within that in ms.
        players: indices into `PLAYERS` of what the model plays.
    """

    names: tuple[str, ...]
    prompt: np.ndarray
    prompt_is_given_T: np.ndarray
    tokens_Gx3: np.ndarray
    segment_G: np.ndarray
    onset_G: np.ndarray
    players: tuple[int, ...]

    @property
    def ids(self) -> np.ndarray:
        """Every token that will come besides the prompt, int [N]."""
        return self.tokens_Gx3[self.tokens_Gx3 >= 0]

    def is_given(self, tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
        """Which tokens of prompt and `ids`, generated behind it, are of given notes; bool [T + N].

        No event of the model's can be taken for a given one: it would have come too late.
        """
        mine = np.concatenate([self.prompt_is_given_T, np.zeros(len(ids), bool)])
        whole = np.concatenate([self.prompt, ids])
        segment = np.cumsum(tokenizer.kind[whole] == Kind.TIME)
        following = 0
        for at in tokenizer.events(whole)[0].tolist():
            event = self.tokens_Gx3[following]
            event = event[event >= 0]
            here = slice(at, at + len(event))
            if at >= len(self.prompt) and segment[at] == self.segment_G[following]:
                mine[here] = (whole[here] == event).all()
                following += int(mine[at])
        return mine

    def performances(
        self, tokenizer: Tokenizer, ids: np.ndarray
    ) -> tuple[Performance, Performance]:
        """The notes that are given and all others, on one timeline from the first of the prompt.

        What both play is on a channel of its own in the former, as long as there are channels.
        """
        whole, is_given = np.concatenate([self.prompt, ids]), self.is_given(tokenizer, ids)
        sounds = np.isin(tokenizer.kind[whole], (Kind.NOTE, Kind.DRUM, *PARTS))
        generated = tokenizer.decode(whole[~is_given])
        given = tokenizer.decode(whole[is_given | ~sounds])
        free = [
            c for c in range(16) if c != DRUM_CHANNEL and c not in generated.programs["channel"]
        ]
        both = np.intersect1d(given.notes["channel"], generated.notes["channel"])
        notes, programs = given.notes.copy(), given.programs
        for channel, other in zip(both[both != DRUM_CHANNEL], free, strict=False):
            notes["channel"][given.notes["channel"] == channel] = other
            program = programs["program"][programs["channel"] == channel][0]
            programs = np.append(programs, np.array([(0, program, other)], PROGRAM))
        return replace(given, notes=notes, programs=programs), generated


def given_tracks(
    source: str | Path | Performance,
    tokenizer: Tokenizer,
    names: str | Sequence[str],
    *,
    play: str | Collection[str] = (),
    seconds: float | None = None,
    notes: int | None = None,
    compat: str | None = None,
) -> GivenTracks:
    """The tracks of those names, and what else plays in the first `seconds` or `notes`.

    Args:
        source: a MIDI file, or a performance, which is one track.
        names: of tracks, in any case, or of instruments (`PLAYERS`), where no track is called so.
        play: instruments that the model plays; by default those of the other tracks, whose notes
            are in the prompt as far as they are played on these.
        seconds, notes: of the prompt, one of them; 0 begins with the first note.
        compat: as in `read_midi`.

    Raises:
        UserError: no such track or instrument; nothing is left for the model to play; or nothing is
            given after the prompt.
    """
    tokenizer = of_aria(tokenizer, "what goes with given tracks")
    name = "the performance" if isinstance(source, Performance) else str(source)
    if tokenizer.has_pedal:
        raise UserError("given tracks need a model of the aria tokenizer: pedal has the piano only")
    names = [names] if isinstance(names, str) else names
    play = [play] if isinstance(play, str) else play
    song, known = _marked(source, names, name, compat)
    given = song.notes["given"]
    heard = _players(song)
    open_players = sorted({_player(one) for one in play} or set(heard[~given].tolist()))
    if not open_players:
        raise UserError(
            f"{name}: nothing but {' and '.join(known)} plays in it: say what the model plays, "
            f"e.g. --play piano bass; there are {', '.join(PLAYERS)}"
        )
    kept = given | np.isin(heard, open_players)
    song, given = replace(song, notes=song.notes[kept]), given[kept]
    announced = sorted({*heard[kept].tolist(), *open_players})
    header = [tokenizer.id_of(("prefix", "instrument", PLAYERS[i])) for i in announced]
    ids = tokenizer.encode(song, add_eos=False).astype(np.int64)
    ids = np.concatenate([header, ids[np.argmax(ids == tokenizer.bos_id) :]])
    at, onset_ms = tokenizer.events(ids)
    length = np.where(tokenizer.kind[ids[at]] == Kind.DRUM, 2, 3)
    starts_ms = song.ms(song.notes["start"])
    if seconds is not None:
        within = starts_ms - starts_ms[0] <= seconds * 1000 if seconds else given[:0]
        notes = int(within.sum())
    n = min(notes or 0, len(at))
    end = at[n - 1] + length[n - 1] if n else len(header) + 1
    later = np.flatnonzero(given)[np.count_nonzero(given[:n]) :]
    if not len(later):
        raise UserError(
            f"{name}: no note of {' and '.join(known)} comes after the prompt, whose last note "
            f"begins at {onset_ms[n - 1] / 1000:.1f} s: shorten it (--seconds, --notes)"
        )
    parts = at[:, None] + np.arange(3)
    tokens_Nx3 = np.where(np.arange(3) < length[:, None], ids[np.minimum(parts, len(ids) - 1)], -1)
    ends_ms = onset_ms + np.where(length == 3, tokenizer.dur_ms[tokens_Nx3[:, 2]], 0)
    times_ms = np.append(onset_ms[later], ends_ms[given].max())
    prompt_is_given_T = np.zeros(end, bool)
    prompt_is_given_T[parts[:n][given[:n]][tokens_Nx3[:n][given[:n]] >= 0]] = True
    return GivenTracks(
        names=tuple(known),
        prompt=ids[:end],
        prompt_is_given_T=prompt_is_given_T,
        tokens_Gx3=np.concatenate([tokens_Nx3[later], [[tokenizer.eos_id, -1, -1]]]).astype(int),
        segment_G=times_ms // SEGMENT_MS,
        onset_G=times_ms % SEGMENT_MS,
        players=tuple(open_players),
    )


def _players(performance: Performance) -> np.ndarray:
    """Index into `PLAYERS` of each note, -1 for instruments without tokens; int64 [N]."""
    is_drum = performance.notes["channel"] == DRUM_CHANNEL
    return np.where(is_drum, len(INSTRUMENTS), INSTRUMENT_OF_PROGRAM[note_programs(performance)])


def _player(name: str) -> int:
    plain = name.lower().replace("drums", "drum")
    if plain not in PLAYERS:
        raise UserError(f"no instrument {name!r}: there are {', '.join(PLAYERS)}")
    return PLAYERS.index(plain)


def _marked(
    source: str | Path | Performance, names: Sequence[str], name: str, compat: str | None
) -> tuple[Performance, list[str]]:
    """All tracks as one performance, whose notes say in a field "given" whether they are, before
    others of their onset; and the names as the file has them.
    """
    tracks = _tracks(source, compat)
    heard = np.unique(np.concatenate([_players(track) for _, track in tracks]))
    playing = [PLAYERS[i] for i in heard.tolist() if i >= 0]
    chosen: list[str] = []
    labels: set[str] = set()
    players: set[int] = set()
    for wanted in names:
        plain = wanted.lower().replace("drums", "drum")
        if found := [label for label, _ in tracks if label.lower() == wanted.lower()]:
            labels.update(found)
        elif plain in playing:
            players.add(PLAYERS.index(plain))
        else:
            raise UserError(
                f"{name}: no track or instrument {wanted!r}; its tracks are "
                f"{', '.join(label for label, _ in tracks)}, its instruments {', '.join(playing)}"
            )
        chosen.append(found[0] if found else plain)
    rows = []
    for label, track in tracks:
        marked = np.zeros(len(track.notes), _MARKED_NOTE)
        for column in NOTE.names or ():
            marked[column] = track.notes[column]
        marked["given"] = np.isin(_players(track), list(players)) | (label in labels)
        rows.append(marked)
    notes = np.concatenate(rows)
    song = replace(tracks[0][1], notes=notes[np.lexsort((~notes["given"], notes["start"]))])
    song = supported_notes(song)
    if not song.notes["given"].any():
        raise UserError(f"{name}: {' and '.join(chosen)}: no note of it has a token")
    return song, chosen


def _tracks(source: str | Path | Performance, compat: str | None) -> list[tuple[str, Performance]]:
    """The tracks with notes and their names, "track 2" where the second has none."""
    if isinstance(source, Performance):
        found = [("all of it", source)]
    else:
        names = _track_names(source, compat)
        read = [read_midi(source, compat=compat, of_tracks=(i,)) for i in range(len(names))]
        found = list(zip(names, read, strict=True))
    found = [(name, track) for name, track in found if len(track.notes)]
    if not found:
        raise InvalidMidi("no-notes", f"{source}: no notes to go with")
    return found


def _track_names(path: str | Path, compat: str | None) -> list[str]:
    import mido

    from data_pipeline import _smf
    from data_pipeline.build.archives import gunzipped
    from data_pipeline.errors import check_file

    data = check_file(path, "one MIDI file").read_bytes()
    data = _smf.unwrapped(gunzipped(data, str(path)), str(path))
    n = len(_smf.decoded_tracks(data, str(path), not compat, False)[2])
    names = [f"track {i}" for i in range(1, n + 1)]
    try:
        named = mido.MidiFile(file=io.BytesIO(data), clip=True).tracks
    except (OSError, EOFError, ValueError, LookupError):  # what we read and mido does not
        return names
    if len(named) != n:
        return names
    return [track.name.strip() or name for track, name in zip(named, names, strict=True)]


@flax.struct.dataclass
class GivenState:
    """Where each sequence stands.

    Attributes:
        free: of the grammar of the model's events.
        next_B: row of the next given event, or of the one that is being written; int32.
        part_B: its token that comes now, -1 where none is being written; int32.
        segment_B: 5 s segments since the piece began, int32.
        onset_B: onset token that was drawn with the event the model has begun, else -1; int32.
    """

    free: GrammarState
    next_B: jax.Array
    part_B: jax.Array
    segment_B: jax.Array
    onset_B: jax.Array


@flax.struct.dataclass
class GivenGrammar:
    """What may come next where some notes are given.

    Attributes:
        free: the grammar of the model's events.
        tokens_Gx3, segment_G, onset_G: as of `GivenTracks`, padded with what never comes.
        eos_id: `<E>`, which is given too, as `<D>` is not to be.
    """

    free: Grammar
    tokens_Gx3: jax.Array
    segment_G: jax.Array
    onset_G: jax.Array
    eos_id: int = flax.struct.field(pytree_node=False)

    def allowed(self, state: GivenState, remaining: jax.Array | int) -> jax.Array:
        """bool [B, V]: what the model may write, or the one token that must come."""
        at_event_B = state.free.expect_B == Expect.EVENT
        allowed_BxV = self.free.allowed(state.free, remaining)
        allowed_BxV = allowed_BxV.at[:, jnp.array([self.eos_id, self.free.dim_id])].set(False)
        allowed_BxV = allowed_BxV.at[:, self.free.time_id].set(at_event_B)
        token_B = self.tokens_Gx3[state.next_B, jnp.maximum(state.part_B, 0)]
        due_B = jnp.where(state.part_B >= 0, token_B, state.onset_B)
        is_due_BxV = jnp.arange(allowed_BxV.shape[1]) == due_B[:, None]
        return jnp.where((due_B >= 0)[:, None], is_due_BxV, allowed_BxV)

    def advance(self, state: GivenState, token_B: jax.Array) -> GivenState:
        """The state after each sequence's next token, int32 [B]."""
        part_B = jnp.where(state.part_B >= 0, state.part_B + 1, -1)
        whole_B = part_B == self._lengths(state)
        return GivenState(
            free=self.free.advance(state.free, token_B),
            next_B=state.next_B + whole_B,
            part_B=jnp.where(whole_B, -1, part_B),
            segment_B=state.segment_B + (token_B == self.free.time_id),
            onset_B=jnp.where(self.free.begins_V[token_B], state.onset_B, -1),
        )

    def _lengths(self, state: GivenState) -> jax.Array:
        """Tokens of each sequence's next given event, int32 [B]."""
        return (self.tokens_Gx3[state.next_B] >= 0).sum(-1)

    def interleave(
        self,
        state: GivenState,
        token_B: jax.Array,
        choose_after: Callable[[jax.Array], jax.Array],
        remaining: jax.Array,
    ) -> tuple[jax.Array, GivenState]:
        """The model's next token, or the first of a given event that comes no later.

        Args:
            token_B: what the model would write.
            choose_after: what it would write behind that; asked for only where it matters.
            remaining: tokens that fit.

        Returns:
            the token, and the state that it is to be read in.
        """
        due_B = (
            (state.free.expect_B == Expect.EVENT)
            & (self.segment_G[state.next_B] == state.segment_B)
            & (remaining >= self._lengths(state))
        )
        asked_B = due_B & self.free.begins_V[token_B]
        onset_B = jax.lax.cond(asked_B.any(), choose_after, lambda token_B: token_B, token_B)
        is_later_B = self.free.onset_V[onset_B] >= self.onset_G[state.next_B]
        takes_B = due_B & (is_later_B | ~asked_B)
        return jnp.where(takes_B, self.tokens_Gx3[state.next_B, 0], token_B), replace(
            state,
            part_B=jnp.where(takes_B, 0, state.part_B),
            onset_B=jnp.where(asked_B & ~takes_B, onset_B, state.onset_B),
        )


def given_grammar(
    tokenizer: Tokenizer, given: GivenTracks, batch: int
) -> tuple[GivenGrammar, GivenState]:
    """What may follow the prompt of given tracks, and the state in which `batch` of it begin."""
    tokenizer = of_aria(tokenizer, "the grammar of given tracks")
    prefix = given.prompt[: int(np.argmax(given.prompt == tokenizer.bos_id))]
    announced = np.unique(tokenizer.instrument[prefix])
    free = make_grammar(tokenizer, given.prompt, silent=np.setdiff1d(announced, given.players))
    n_padding = _ROWS - len(given.tokens_Gx3) % _ROWS

    def table(rows: np.ndarray, padding: int) -> jax.Array:
        widths = [(0, n_padding), *[(0, 0)] * (rows.ndim - 1)]
        return jnp.asarray(np.pad(rows, widths, constant_values=padding), jnp.int32)

    grammar = GivenGrammar(
        free,
        table(given.tokens_Gx3, -1),
        table(given.segment_G, _NEVER),
        table(given.onset_G, _NEVER),
        eos_id=tokenizer.eos_id,
    )
    segment = int(np.count_nonzero(given.prompt == tokenizer.time_id))
    return grammar, GivenState(
        free=state_after(tokenizer, given.prompt, batch),
        next_B=jnp.zeros(batch, jnp.int32),
        part_B=jnp.full(batch, -1, jnp.int32),
        segment_B=jnp.full(batch, segment, jnp.int32),
        onset_B=jnp.full(batch, -1, jnp.int32),
    )
