"""A piano-roll player for HTML pages: Web Audio, no download, seek by clicking."""

import json
from collections.abc import Sequence

from aria_jax.report.piano_roll import COLOURS, Part

PLAYER_SCRIPT = """
<style>.player canvas { width: 100%; height: 180px; background: #fafaf8; border: 1px solid #ddd;
  cursor: pointer; display: block } .player button { margin: .4rem .8rem .4rem 0; font-size: 1rem }
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
  function tone(when, seconds, pitch, velocity, out) {
    // A struck string: three decaying partials, lower notes ring longer.
    const loudness = Math.pow(velocity / 127, 1.6) * 0.22, end = when + Math.max(seconds, 0.08);
    const ring = 4 * Math.pow(2, (60 - pitch) / 24);
    [[1, 1, 'triangle'], [2, 0.3, 'sine'], [3, 0.12, 'sine']].forEach(([n, share, shape]) => {
      const oscillator = context.createOscillator(), gain = context.createGain();
      oscillator.type = shape;
      oscillator.frequency.value = n * 440 * Math.pow(2, (pitch - 69) / 12);
      gain.gain.setValueAtTime(0, when);
      gain.gain.linearRampToValueAtTime(loudness * share, when + 0.006);
      gain.gain.setTargetAtTime(0, when + 0.006, ring / (n * 3));
      gain.gain.setTargetAtTime(0, end, 0.06);
      oscillator.connect(gain).connect(out);
      oscillator.start(when);
      oscillator.stop(end + 0.4);
    });
  }
  function setUp(root) {
    const data = JSON.parse(root.querySelector('script').textContent), canvas = root.querySelector('canvas');
    const button = root.querySelector('button'), clock = root.querySelector('span');
    const notes = data.notes, length = notes.reduce((m, n) => Math.max(m, n[0] + n[1]), 1);
    const low = notes.reduce((m, n) => Math.min(m, n[2]), 127) - 2;
    const high = notes.reduce((m, n) => Math.max(m, n[2]), 0) + 2;
    let position = 0;
    function draw() {
      const scale = window.devicePixelRatio || 1, pen = canvas.getContext('2d');
      const w = canvas.width = canvas.clientWidth * scale, h = canvas.height = canvas.clientHeight * scale;
      const row = h / Math.max(high - low, 12);
      for (const [start, seconds, pitch, velocity, part] of notes) {
        pen.globalAlpha = 0.35 + 0.65 * velocity / 127;
        pen.fillStyle = data.colours[part % data.colours.length];
        pen.fillRect(start / length * w, (high - pitch) * row, Math.max(seconds / length * w, 1.5), row);
      }
      pen.globalAlpha = 1; pen.fillStyle = '#222';
      pen.fillRect(position / length * w, 0, scale, h);
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
      const step = () => {
        position = context.currentTime - origin;
        while (waiting.length && waiting[0][0] < position + 1) {  // a second ahead of the clock
          const [at, seconds, pitch, velocity] = waiting.shift();
          tone(Math.max(origin + at, context.currentTime), seconds, pitch, velocity, master);
        }
        draw();
        if (position > length) { stop(); position = 0; draw(); return; }
        playing.frame = requestAnimationFrame(step);
      };
      step();
    }
    button.onclick = () => playing && playing.button === button ? stop() : start();
    canvas.onclick = event => {
      const again = playing && playing.button === button;
      position = event.offsetX / canvas.clientWidth * length;
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


def player(parts: Sequence[Part], colours: Sequence[str] = COLOURS) -> str:
    """One player as HTML: a roll in the parts' colours, play and stop, seek by clicking."""
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
    # The file is ASCII numbers only: nothing in it can close the script element.
    data = json.dumps({"notes": notes, "colours": list(colours)}, separators=(",", ":"))
    return (
        f'<div class="player"><script type="application/json">{data}</script>'
        "<canvas></canvas><button>\u25b6 play</button><span></span></div>"
    )
