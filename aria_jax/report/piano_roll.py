"""Piano rolls: pitch over time, loudness as opacity, one colour per part; as pictures, and as
players for HTML pages (Web Audio, nothing downloaded, seek by clicking), where each family of
General MIDI's instruments has a sound of its own, and so have drums.
"""

import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.midi import DRUM_CHANNEL, Performance, note_programs
from data_pipeline.vocabulary import FAMILIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    *("#3b5b92", "#d1622b", "#3d8a5f", "#8c4a86", "#b58a1c", "#2f8fa3"),
    *("#a8394a", "#6d6d6d", "#7a9a2c", "#5f57b8", "#c06a9e"),
)
"""As many as tokens have instruments; the first two tell a prompt from what follows it."""
DRUMS = "drums"


@dataclass(frozen=True)
class Part:
    """Notes of one colour.

    Attributes:
        label: what the legend says.
        pitch, velocity: int arrays [N].
        start_ms, end_ms: float or int arrays [N].
        sound: of `FAMILIES`, or "drums".
    """

    label: str
    pitch: np.ndarray
    velocity: np.ndarray
    start_ms: np.ndarray
    end_ms: np.ndarray
    sound: str = "piano"

    @classmethod
    def of(cls, performance: Performance, label: str, offset_ms: float = 0) -> "Part":
        """All notes of a performance, shifted by `offset_ms`."""
        notes = performance.notes
        return cls(
            label=label,
            pitch=notes["pitch"].astype(int),
            velocity=notes["velocity"].astype(int),
            start_ms=performance.ms(notes["start"]) + offset_ms,
            end_ms=performance.ms(notes["end"]) + offset_ms,
        )


def parts_by_instrument(performance: Performance) -> list[Part]:
    """A part for each family of instruments that plays, in General MIDI's order, drums last."""
    family = note_programs(performance).astype(int) // 8
    family[performance.notes["channel"] == DRUM_CHANNEL] = len(FAMILIES)
    found = []
    for number in np.unique(family).tolist():
        name = (*FAMILIES, DRUMS)[number]
        own = replace(performance, notes=performance.notes[family == number])
        found.append(replace(Part.of(own, name.replace("_", " ")), sound=name))
    return found


def draw_piano_roll(axes: "Axes", parts: Sequence[Part]) -> None:
    """Draws `parts` into matplotlib `axes`, time in seconds."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch

    for part, colour in zip(parts, COLOURS * (len(parts) // len(COLOURS) + 1), strict=False):
        left, right = part.start_ms / 1000, np.maximum(part.end_ms, part.start_ms + 30) / 1000
        low, high = part.pitch - 0.45, part.pitch + 0.45
        corners = np.stack(
            [np.stack(xy, -1) for xy in ((left, low), (left, high), (right, high), (right, low))],
            axis=1,
        )
        rgba = np.tile(to_rgba(colour), (len(part.pitch), 1))
        rgba[:, 3] = 0.35 + 0.65 * part.velocity / 127
        axes.add_collection(PolyCollection(list(corners), facecolors=rgba, linewidths=0))
    filled = [part for part in parts if len(part.pitch)]
    if filled:
        axes.set_xlim(
            min(p.start_ms.min() for p in filled) / 1000, max(p.end_ms.max() for p in filled) / 1000
        )
        axes.set_ylim(
            min(p.pitch.min() for p in filled) - 2, max(p.pitch.max() for p in filled) + 2
        )
    axes.set_yticks([24, 36, 48, 60, 72, 84, 96], [f"C{octave}" for octave in range(1, 8)])
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds")
    if len(parts) > 1:
        handles = [Patch(color=c, label=p.label) for p, c in zip(parts, COLOURS, strict=False)]
        axes.legend(handles=handles, loc="upper right", fontsize="small", framealpha=0.8)


def piano_roll(parts: Sequence[Part], size_inches: tuple[float, float] = (10, 3)) -> "Figure":
    """One piano roll as a matplotlib figure (no global state, safe in threads)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, layout="constrained")
    draw_piano_roll(figure.add_subplot(), parts)
    return figure


def piano_roll_svg(parts: Sequence[Part], size_inches: tuple[float, float] = (10, 3)) -> str:
    """A piano roll as an `<svg>` element to put inside an HTML page."""
    return figure_svg(piano_roll(parts, size_inches))


def figure_svg(figure: "Figure") -> str:
    """Any matplotlib figure as an `<svg>` element, without the XML preamble."""
    import matplotlib

    buffer = io.StringIO()
    # A fixed salt makes ids, and so the whole report, reproducible.
    with matplotlib.rc_context({"svg.hashsalt": "aria-jax", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


PLAYER_SCRIPT = """
<style>.player canvas { width: 100%; height: 200px; background: #fff; cursor: pointer; display: block }
.player button { margin: .4rem .8rem .4rem 0; font-size: 1rem } .player .legend { font-size: .85rem; color: var(--soft) }
.player .legend span { display: inline-block }
.player .legend i { display: inline-block; width: .8em; height: .8em; margin: 0 .35em 0 1em; border-radius: 2px }
</style>
<script>
(() => {
  let context, playing = null;
  const stop = () => {
    if (!playing) return;
    playing.master.disconnect();
    cancelAnimationFrame(playing.frame);
    playing.button.textContent = "\\u25b6 play";
    playing = null;
  };
  // Of each family: partials (multiple, share, shape), seconds to full loudness, and how long it
  // rings (at C4; 0: as long as it is held). A struck string is the first of them.
  const VOICES = {
    piano: [[[1, 1, 'triangle'], [2, .3, 'sine'], [3, .12, 'sine']], .006, 4],
    chromatic: [[[1, 1, 'sine'], [4, .3, 'sine']], .003, 2],
    organ: [[[1, .5, 'sine'], [2, .35, 'sine'], [4, .2, 'sine']], .02, 0],
    guitar: [[[1, .6, 'sawtooth'], [2, .2, 'triangle']], .004, 1.2],
    bass: [[[1, 1.2, 'triangle'], [2, .25, 'sine']], .008, 2.5],
    strings: [[[1, .3, 'sawtooth'], [1.005, .3, 'sawtooth']], .08, 0],
    ensemble: [[[.997, .3, 'sawtooth'], [1.004, .3, 'triangle']], .12, 0],
    brass: [[[1, .4, 'sawtooth'], [2, .15, 'square']], .04, 0],
    reed: [[[1, .35, 'square'], [3, .1, 'sine']], .03, 0],
    pipe: [[[1, .8, 'sine'], [2, .12, 'sine']], .05, 0],
    synth_lead: [[[1, .3, 'square'], [1.006, .3, 'sawtooth']], .01, 0],
  };
  function tone(when, seconds, pitch, velocity, out, sound) {
    if (sound === 'drums') return hit(when, pitch, velocity, out);
    const loudness = Math.pow(velocity / 127, 1.6) * 0.22, end = when + Math.max(seconds, 0.08);
    const [partials, attack, rings] = VOICES[sound] || VOICES.piano;
    const ring = rings * Math.pow(2, (60 - pitch) / 24);  // lower notes ring longer
    partials.forEach(([n, share, shape]) => {
      const oscillator = context.createOscillator(), gain = context.createGain();
      oscillator.type = shape;
      oscillator.frequency.value = n * 440 * Math.pow(2, (pitch - 69) / 12);
      gain.gain.setValueAtTime(0, when);
      gain.gain.linearRampToValueAtTime(loudness * share, when + attack);
      if (ring) gain.gain.setTargetAtTime(0, when + attack, ring / (n * 3));
      gain.gain.setTargetAtTime(0, Math.max(end, when + attack), 0.06);
      oscillator.connect(gain).connect(out);
      oscillator.start(when);
      oscillator.stop(end + attack + 0.4);
    });
  }
  let noise;
  // A drum: a falling tone, filtered noise, or both, by General MIDI's keys for percussion.
  function hit(when, key, velocity, out) {
    const loudness = Math.pow(velocity / 127, 1.6) * 0.4, shell = context.createGain();
    const isKick = key <= 36, isTom = [41, 43, 45, 47, 48, 50].includes(key), isSnare = [37, 38, 39, 40].includes(key);
    const isLong = [46, 49, 51, 52, 53, 55, 57, 59].includes(key), last = isLong ? .5 : isKick || isTom ? .18 : .07;
    shell.gain.setValueAtTime(loudness, when);
    shell.gain.setTargetAtTime(0, when, last / 2);
    shell.connect(out);
    if (isKick || isTom || isSnare) {
      const drum = context.createOscillator(), from = isKick ? 120 : isSnare ? 190 : 90 + 8 * (key - 41);
      drum.frequency.setValueAtTime(from, when);
      drum.frequency.exponentialRampToValueAtTime(from / 2.5, when + .12);
      drum.connect(shell);
      drum.start(when); drum.stop(when + 4 * last);
    }
    if (isKick || isTom) return;
    if (!noise) {
      noise = context.createBuffer(1, context.sampleRate, context.sampleRate);
      noise.getChannelData(0).forEach((_, i, samples) => { samples[i] = Math.random() * 2 - 1; });
    }
    const source = context.createBufferSource(), filter = context.createBiquadFilter();
    source.buffer = noise;
    filter.type = 'highpass'; filter.frequency.value = isSnare ? 1200 : 6500;
    source.connect(filter).connect(shell);
    source.start(when, Math.random() / 4, 4 * last);
  }
  function setUp(root) {
    const data = JSON.parse(root.querySelector('script').textContent), canvas = root.querySelector('canvas');
    const button = root.querySelector('button'), clock = root.querySelector('.clock');
    const notes = data.notes, length = notes.reduce((m, n) => Math.max(m, n[0] + n[1]), 1);
    const low = notes.reduce((m, n) => Math.min(m, n[2]), 127) - 2;
    const high = notes.reduce((m, n) => Math.max(m, n[2]), 0) + 2;
    const left = 34, below = 18;  // CSS pixels of the pitch axis and of the time axis
    const step = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600].find(s => length / s <= 12) || 1800;
    let position = 0;
    function draw() {
      const scale = window.devicePixelRatio || 1, pen = canvas.getContext('2d');
      canvas.width = canvas.clientWidth * scale; canvas.height = canvas.clientHeight * scale;
      pen.scale(scale, scale);
      const w = canvas.clientWidth - left - 1, h = canvas.clientHeight - below;
      const row = h / Math.max(high - low, 12), x = seconds => left + seconds / length * w;
      const line = (x0, y0, wide, tall, colour) => { pen.fillStyle = colour; pen.fillRect(x0, y0, wide, tall); };
      pen.font = '11px system-ui, sans-serif';
      pen.textBaseline = 'middle'; pen.textAlign = 'right';
      for (let c = 12; c <= 120; c += 12) {
        const y = (high - c + 0.5) * row;
        if (y < 5 || y > h) continue;
        line(left, y, w, 1, '#e6e6e2');
        pen.fillStyle = '#666'; pen.fillText('C' + (c / 12 - 1), left - 6, y);
      }
      pen.textBaseline = 'top'; pen.textAlign = 'center';
      for (let s = 0; s <= length; s += step) {
        line(x(s), h, 1, 4, '#999');
        pen.fillStyle = '#666';
        pen.textAlign = s === 0 ? 'left' : s / length > 0.97 ? 'right' : 'center';
        pen.fillText(s + (s === 0 ? ' s' : ''), x(s), h + 5);
      }
      line(left, 0, 1, h, '#999'); line(left, h, w, 1, '#999');
      for (const [start, seconds, pitch, velocity, part] of notes) {
        pen.globalAlpha = 0.35 + 0.65 * velocity / 127;
        line(x(start), (high - pitch) * row, Math.max(seconds / length * w, 1.5), row,
             data.colours[part % data.colours.length]);
      }
      pen.globalAlpha = 1;
      for (const [seconds, label] of data.marks) {
        pen.setLineDash([4, 3]); pen.strokeStyle = '#222'; pen.beginPath();
        pen.moveTo(x(seconds), 0); pen.lineTo(x(seconds), h); pen.stroke(); pen.setLineDash([]);
        pen.textAlign = 'left'; pen.fillStyle = '#222'; pen.fillText(label, x(seconds) + 5, 2);
      }
      line(x(position), 0, 1.5, h, '#222');
      clock.textContent = position.toFixed(1) + ' / ' + length.toFixed(1) + ' s';
    }
    function start() {
      stop();
      context = context || new AudioContext();
      context.resume();
      const master = context.createDynamicsCompressor();
      master.connect(context.destination);
      const origin = context.currentTime + 0.1 - position, waiting = notes.filter(n => n[0] >= position);
      playing = {master, button};
      button.textContent = "\\u25a0 stop";
      const follow = () => {
        position = context.currentTime - origin;
        while (waiting.length && waiting[0][0] < position + 1) {  // a second ahead of the clock
          const [at, seconds, pitch, velocity, part] = waiting.shift();
          tone(Math.max(origin + at, context.currentTime), seconds, pitch, velocity, master, data.sounds[part]);
        }
        draw();
        if (position > length) { stop(); position = 0; draw(); return; }
        playing.frame = requestAnimationFrame(follow);
      };
      follow();
    }
    button.onclick = () => playing && playing.button === button ? stop() : start();
    canvas.onclick = event => {
      const again = playing && playing.button === button;
      const share = (event.offsetX - left) / (canvas.clientWidth - left - 1);
      position = Math.min(Math.max(share, 0), 1) * length;
      again ? start() : draw();
    };
    window.addEventListener('resize', draw);
    draw();
  }
  document.addEventListener('DOMContentLoaded', () => document.querySelectorAll('.player').forEach(setUp));
})();
</script>
"""  # noqa: E501
"""Goes once into any page that holds players."""


def player(parts: Sequence[Part], *, marks: Sequence[tuple[float, str]] = ()) -> str:
    """One player as HTML: a roll with axes in the parts' colours, play and stop, seek by clicking.

    Args:
        parts: named in a legend where there are several.
        marks: moments to mark by a line, in seconds, with a word each.
    """
    notes = [
        [
            round(float(start) / 1000, 3),
            round(max(float(end - start), 10.0) / 1000, 3),
            int(pitch),
            int(velocity),
            number,
        ]
        for number, part in enumerate(parts)
        for start, end, pitch, velocity in zip(
            part.start_ms, part.end_ms, part.pitch, part.velocity, strict=True
        )
    ]
    notes.sort()
    content = {"notes": notes, "colours": list(COLOURS), "marks": [list(mark) for mark in marks],
               "sounds": [part.sound for part in parts]}  # fmt: skip
    # No text in it may close the script element.
    data = json.dumps(content, separators=(",", ":")).replace("</", "<\\/")
    named = [
        f'<span><i style="background:{COLOURS[number % len(COLOURS)]}"></i>'
        f"{html.escape(part.label)}</span>"
        for number, part in enumerate(parts)
    ]
    legend = f'<span class="legend">{"".join(named)}</span>' if len(parts) > 1 else ""
    return (
        f'<div class="player"><script type="application/json">{data}</script>'
        f'<canvas></canvas><button>\u25b6 play</button><span class="clock"></span>{legend}</div>'
    )
