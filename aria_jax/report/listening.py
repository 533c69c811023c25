"""Pages to listen to: continuations and their files, what a search found, blinded pairs."""

import html
import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import relpath
from pathlib import Path

import numpy as np

from aria_jax.report import Provenance, Section, link, paragraph, save_chart, table, write_page
from aria_jax.report.piano_roll import (
    PLAYER_SCRIPT,
    Part,
    parts_by_instrument,
    piano_roll,
    player,
)  # fmt: skip
from data_pipeline.errors import UserError, check_file
from data_pipeline.midi import Performance, write_midi

SAMPLE_RATE = 44_100


@dataclass(frozen=True)
class Result:
    """One continuation as performances on one timeline.

    Attributes:
        full: prompt and continuation.
        prompt, continuation: the notes of either, on the timeline of `full`.
        continuation_from_zero: the continuation as a piece of its own.
        remark: a few words under its heading.
        by_origin: of tracks that were given their notes, and all others; empty without such.
    """

    full: Performance
    prompt: Performance
    continuation: Performance
    continuation_from_zero: Performance
    remark: str = ""
    by_origin: tuple[Performance, ...] = ()

    @property
    def parts(self) -> list[Part]:
        """Prompt and continuation as the two colours of a roll; of several instruments, those; what
        is given has colours of its own, on top.
        """
        if self.by_origin:
            given, others = map(parts_by_instrument, self.by_origin)
            return [*others, *(replace(part, label=f"{part.label} (given)") for part in given)]
        if len(instruments := parts_by_instrument(self.full)) > 1:
            return instruments
        prompt = [Part.of(self.prompt, "prompt")] if len(self.prompt.notes) else []
        return [*prompt, Part.of(self.continuation, "continuation")]


def save_continuations(
    out_dir: str | Path,
    name: str,
    results: Sequence[Result],
    *,
    made_by: Provenance,
    soundfont: str | Path | None = None,
) -> list[dict[str, str]]:
    """Writes, per continuation, NAME-i.mid, NAME-i-continuation.mid and NAME-i.png, and NAME.html.

    Args:
        made_by: stands at the end of the page.
        soundfont: an .sf2 or .sf3 file; with it NAME-i.wav is rendered too.

    Returns:
        Paths by kind ("midi", "continuation", "picture", "sound", "page"), one dict a result.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    page = out_dir / f"{name}.html"
    saved = []
    for number, result in enumerate(results, start=1):
        base = out_dir / f"{name}-{number}"
        paths = {
            "midi": f"{base}.mid",
            "continuation": f"{base}-continuation.mid",
            "picture": f"{base}.png",
        }
        write_midi(result.full, paths["midi"])
        write_midi(result.continuation_from_zero, paths["continuation"])
        save_chart(piano_roll(result.parts), paths["picture"], made_by.command)
        if soundfont is not None:
            paths["sound"] = f"{base}.wav"
            render_wav(paths["midi"], paths["sound"], soundfont)
        saved.append(paths | {"page": str(page)})
    sections = [
        Section(f"Continuation {number}", _section(result, paths))
        for number, (result, paths) in enumerate(zip(results, saved, strict=True), start=1)
    ]
    intro = PLAYER_SCRIPT + paragraph(
        "Pitch over seconds; the darker, the louder. Click into a roll to listen from there. The "
        "sound is a plain synthesiser of this page; the MIDI files sound as good as the instrument "
        "that plays them.",
        "note",
    )
    write_page(page, f"Continuations of {name}", intro, sections, made_by)
    return saved


def _section(result: Result, paths: dict[str, str]) -> str:
    names = {"midi": "with the prompt", "continuation": "continuation only", "sound": "sound"}
    links = " · ".join(
        link(Path(paths[kind]).name, text) for kind, text in names.items() if kind in paths
    )
    first = result.continuation.notes["start"]
    marks = (
        [(float(first.min()) / 1000, "continuation")]
        if len(result.prompt.notes) and len(first)
        else []
    )
    return player(result.parts, marks=marks) + paragraph(result.remark) + f"<p>{links}</p>"


def check_sound(soundfont: str | Path) -> None:
    """Raises `UserError` where the synthesiser is missing, or this is no SoundFont."""
    if importlib.util.find_spec("symusic") is None:
        raise UserError(
            "sound needs the package symusic: pip install 'aria-jax[audio]' (or symusic)"
        )
    with check_file(soundfont, "a SoundFont").open("rb") as file:
        head = file.read(12)
    if head[:4] + head[8:] != b"RIFFsfbk":
        raise UserError(f"{soundfont}: not a SoundFont (.sf2 or .sf3 file)")


def render_wav(midi_path: str | Path, wav_path: str | Path, soundfont: str | Path) -> None:
    """Plays a MIDI file through a SoundFont (16-bit stereo, 44.1 kHz).

    Raises:
        UserError: the synthesiser is not installed, or there is no such SoundFont.
    """
    check_sound(soundfont)
    import symusic

    synthesizer = symusic.Synthesizer(sf_path=str(soundfont), sample_rate=SAMPLE_RATE)
    try:
        audio = synthesizer.render(symusic.Score(str(midi_path)), stereo=True)
    except TypeError:  # symusic 0.6.0 cannot hand its sound over to numpy
        raise UserError(
            "this version of symusic cannot render sound: pip install 'aria-jax[audio]' for one "
            "that can"
        ) from None
    symusic.dump_wav(str(wav_path), audio, sample_rate=SAMPLE_RATE, use_int16=True)


SHOWN_SECONDS = 60
"""Of each piece that its player holds."""


@dataclass(frozen=True)
class Found:
    """A performance near the query.

    Attributes:
        score: cosine similarity.
        quantile: share of random pairs of embeddings that are less similar; None if unknown.
        file: its MIDI file; None where that is not at hand.
        performance: what the row stands for, the file or a slice of it; None as `file`.
        same_file: whether it is the query itself.
    """

    score: float
    quantile: float | None
    path: str
    labels: dict[str, str]
    file: Path | None
    performance: Performance | None
    same_file: bool


def write_search_page(
    path: str | Path,
    query_file: Path,
    query: Performance,
    found: Sequence[Found],
    *,
    missing: str,
    made_by: Provenance,
) -> None:
    """Writes a self-contained page: query, table of scores, a player for each performance found.

    Args:
        missing: said in place of a player where a MIDI file is not at hand.
    """
    folder = Path(path).resolve().parent
    names = sorted({name for hit in found for name in hit.labels} - {"split", "title"})
    rows: list[list[str | float]] = [
        [
            str(rank),
            hit.score,
            "" if hit.quantile is None else f"{100 * hit.quantile:.1f} %",
            _name(hit),
            *(hit.labels.get(name, "") for name in names),
        ]
        for rank, hit in enumerate(found, start=1)
    ]
    header = ("", "cosine", "of random pairs are further apart", "file", *names)
    sections = [
        Section("The query", _listen(query, query_file, folder)),
        Section("Nearest performances", table(header, rows)),
    ]
    for rank, hit in enumerate(found, start=1):
        body = paragraph(missing, "note")
        if hit.performance is not None and hit.file is not None:
            body = _listen(hit.performance, hit.file, folder)
        sections.append(Section(f"{rank}. {_name(hit)} ({hit.score:.3f})", body))
    intro = PLAYER_SCRIPT + paragraph(
        "Cosine similarity of embeddings: 1 is the same direction. How much a number means depends "
        "on the model, so each stands beside the share of random pairs of these embeddings that "
        f"are further apart. Players hold the first {SHOWN_SECONDS} seconds.",
        "note",
    )
    write_page(path, f"Nearest to {query_file.name}", intro, sections, made_by)


def _listen(performance: Performance, file: Path, folder: Path) -> str:
    """A player of the first `SHOWN_SECONDS` from the first note on, and a link to the file."""
    shown, start_ms = [], performance.ms(performance.notes["start"])
    begin = start_ms.min() if len(start_ms) else 0
    for part in parts_by_instrument(performance):
        early = part.start_ms < begin + SHOWN_SECONDS * 1000
        shown.append(
            replace(
                part,
                pitch=part.pitch[early],
                velocity=part.velocity[early],
                start_ms=part.start_ms[early] - begin,
                end_ms=np.minimum(part.end_ms[early] - begin, SHOWN_SECONDS * 1000),
            )
        )
    target = relpath(file.resolve(), folder)
    return f"{player(shown)}<p>{link(target, file.name)}</p>"


def _name(hit: Found) -> str:
    return f"{hit.path} (the query itself)" if hit.same_file else hit.path


AUDIO_SUFFIXES = (".wav", ".mp3", ".ogg", ".flac", ".m4a")

_VOTING = """
<script>
(() => {
  const study = STUDY, storage = 'listening-test-' + study.study + '-' + study.judge;
  const votes = JSON.parse(localStorage.getItem(storage) || '{}');
  function refresh() {
    const done = Object.keys(votes).length, button = document.getElementById('download');
    document.getElementById('done').textContent = done + ' of ' + study.trials.length + ' answered';
    button.disabled = done < study.trials.length;
  }
  document.addEventListener('DOMContentLoaded', () => {
    document.querySelectorAll('input[type=radio]').forEach(input => {
      input.checked = votes[input.name] === input.value;
      input.onchange = () => {
        votes[input.name] = input.value;
        localStorage.setItem(storage, JSON.stringify(votes));
        refresh();
      };
    });
    document.getElementById('download').onclick = () => {
      const content = JSON.stringify({study: study.study, judge: study.judge, votes});
      const link = document.createElement('a');
      link.href = URL.createObjectURL(new Blob([content], {type: 'application/json'}));
      link.download = 'votes-' + study.judge + '.json';
      link.click();
    };
    refresh();
  });
})();
</script>
"""


@dataclass(frozen=True)
class Clip:
    """What one system plays: notes for the page's own player, or a sound file to copy.

    Attributes:
        performance: prompt and continuation; None for sound.
        sound: path of a sound file; None for notes.
    """

    performance: Performance | None = None
    sound: Path | None = None


@dataclass(frozen=True)
class Question:
    """Two clips to compare, already in the order in which they are shown."""

    trial_id: str
    first: Clip
    second: Clip


def _clip_html(
    clip: Clip, trial_id: str, side: str, out_dir: Path, seconds: float, prompt_seconds: float
) -> str:
    if clip.performance is not None:
        # Colours of instruments, and the same mark on either side: whose the rest is, is not seen.
        shown = up_to(clip.performance, seconds)
        start_ms = shown.ms(shown.notes["start"])
        first = start_ms.min() if len(start_ms) else 0
        parts = [
            replace(part, start_ms=part.start_ms - first, end_ms=part.end_ms - first)
            for part in parts_by_instrument(shown)
        ]
        return player(parts, marks=[(prompt_seconds, "the prompt ends")])
    if clip.sound is None:
        raise ValueError(f"trial {trial_id}: a clip needs notes or a sound file")
    # A copy under the trial's name: the original's name could tell.
    name = f"{trial_id}-{side}{clip.sound.suffix.lower()}"
    (out_dir / "clips").mkdir(exist_ok=True)
    shutil.copyfile(clip.sound, out_dir / "clips" / name)
    return (
        f'<audio controls preload="none" src="clips/{html.escape(name, quote=True)}"></audio>'
        f"<p>The prompt ends at {prompt_seconds:g} s.</p>"
    )


def up_to(performance: Performance, seconds: float) -> Performance:
    """The notes that begin within the first `seconds` after the first one."""
    start_ms = performance.ms(performance.notes["start"])
    if not len(start_ms):
        return performance
    return performance.slice_notes(0, int((start_ms - start_ms[0] < seconds * 1000).sum()))


def write_judge_page(
    path: str | Path,
    *,
    study: str,
    judge: str,
    questions: Sequence[Question],
    seconds: float,
    prompt_seconds: float,
) -> None:
    """Writes one judge's page; answers stay in the browser until downloaded as votes-JUDGE.json.

    Args:
        study: name that votes carry, so that none goes to another study.
        seconds: how much of a clip is played.
        prompt_seconds: where the prompt ends, which is marked.
    """
    path = Path(path)
    sections = []
    for number, question in enumerate(questions, start=1):
        clips = "".join(
            f"<h3>{label}</h3>"
            + _clip_html(clip, question.trial_id, side, path.parent, seconds, prompt_seconds)
            for label, side, clip in (
                ("First", "first", question.first),
                ("Second", "second", question.second),
            )
        )
        choices = "".join(
            f'<label><input type="radio" name="{html.escape(question.trial_id, quote=True)}" '
            f'value="{value}"> {text}</label>&emsp;'
            for value, text in (
                ("first", "the first"),
                ("tie", "no preference"),
                ("second", "the second"),
            )
        )
        sections.append(Section(f"Pair {number}", f"{clips}<p>I prefer {choices}</p>"))
    identity = json.dumps(
        {"study": study, "judge": judge, "trials": [q.trial_id for q in questions]}
    ).replace("</", "<\\/")
    intro = (
        PLAYER_SCRIPT
        + _VOTING.replace("STUDY", identity)
        + paragraph(
            f"Each pair begins with the same {prompt_seconds:g} seconds of music and goes on in "
            "two ways; a line marks where. Listen to both to the end, as often as you like, and "
            "say which continuation you prefer as music."
        )
        + paragraph("When all are answered, download the answers and send them back.")
        + '<p><button id="download">download answers</button> <span id="done"></span></p>'
    )
    write_page(path, "Listening test", intro, sections)
