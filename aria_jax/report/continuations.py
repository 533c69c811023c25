"""What a user gets of continuations: MIDI files, piano rolls, sound, and a page to hear them on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aria_jax.report.page import Provenance, Section, link, paragraph, write_page
from aria_jax.report.piano_roll import PLAYER_SCRIPT, Part, player, save_piano_roll
from data_pipeline.errors import UserError
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
    """

    full: Performance
    prompt: Performance
    continuation: Performance
    continuation_from_zero: Performance
    remark: str = ""

    @property
    def parts(self) -> list[Part]:
        """Prompt and continuation as the two colours of a roll."""
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
        save_piano_roll(paths["picture"], result.parts)
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


def render_wav(midi_path: str | Path, wav_path: str | Path, soundfont: str | Path) -> None:
    """Plays a MIDI file through a SoundFont (16-bit stereo, 44.1 kHz).

    Raises:
        UserError: the synthesiser is not installed, or there is no such SoundFont.
    """
    try:
        import symusic
    except ImportError:
        raise UserError(
            "sound needs the package symusic: pip install 'aria-jax[audio]' (or symusic)"
        ) from None
    if not Path(soundfont).is_file():
        raise UserError(f"{soundfont}: no such SoundFont (.sf2 or .sf3 file)")
    synthesizer = symusic.Synthesizer(sf_path=str(soundfont), sample_rate=SAMPLE_RATE)
    try:
        audio = synthesizer.render(symusic.Score(str(midi_path)), stereo=True)
    except TypeError:  # symusic 0.6.0 cannot hand its sound over to numpy
        raise UserError(
            "this version of symusic cannot render sound: pip install 'aria-jax[audio]' for one "
            "that can"
        ) from None
    symusic.dump_wav(str(wav_path), audio, sample_rate=SAMPLE_RATE, use_int16=True)
