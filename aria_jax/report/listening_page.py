"""Blinded A/B pages: one static HTML file a judge, which knows no system by name."""

import html
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aria_jax.report.page import Section, paragraph, write_page
from aria_jax.report.piano_roll import PLAYER_SCRIPT, Part, player
from data_pipeline.midi import Performance

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
        # One colour, and the same mark on either side: whose the rest is, is not to be seen.
        shown = up_to(clip.performance, seconds)
        start_ms = shown.ms(shown.notes["start"])
        part = Part.of(shown, "clip", offset_ms=-start_ms.min() if len(start_ms) else 0)
        return player([part], marks=[(prompt_seconds, "the prompt ends")])
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
