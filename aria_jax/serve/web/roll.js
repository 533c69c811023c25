// The piano roll, which scrolls, and the piano below it.
export const LOW = 21, HIGH = 108;
const SHARPS = new Set([1, 3, 6, 8, 10]);
const PAST_MS = 8000, AHEAD_MS = 3000;

export const isSharp = pitch => SHARPS.has(pitch % 12);

export class Roll {
  // notes: [{who: "you" | "model", pitch, velocity, start, end|null}] in session ms
  constructor(canvas, notes, now, marks) {
    Object.assign(this, { canvas, notes, now, marks });
    const draw = () => { this.draw(); requestAnimationFrame(draw); };
    requestAnimationFrame(draw);
  }

  draw() {
    const { canvas } = this, scale = devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    const style = getComputedStyle(document.body), g = canvas.getContext("2d");
    g.setTransform(scale, 0, 0, scale, 0, 0);
    g.clearRect(0, 0, width, height);
    const now = this.now(), row = height / (HIGH - LOW + 1);
    const x = t => (t - now + PAST_MS) / (PAST_MS + AHEAD_MS) * width;
    const y = pitch => (HIGH - pitch) * row;
    g.fillStyle = style.getPropertyValue("--line");
    for (let pitch = 24; pitch <= HIGH; pitch += 12) g.fillRect(0, y(pitch) + row, width, 1);
    for (const mark of this.marks) g.fillRect(x(mark), 0, 1, height);
    const colours = { you: style.getPropertyValue("--you"), model: style.getPropertyValue("--model") };
    const down = new Map();
    for (const note of this.notes) {
      const end = note.end ?? now;
      if (end < now - PAST_MS || note.start > now + AHEAD_MS) continue;
      g.globalAlpha = 0.4 + 0.6 * note.velocity / 127;
      g.fillStyle = colours[note.who];
      const left = x(note.start);
      g.fillRect(left, y(note.pitch), Math.max(3, x(end) - left), Math.max(2, row - 0.5));
      if (note.start <= now && (note.end === null || note.end > now)) down.set(note.pitch, note.who);
    }
    g.globalAlpha = 1;
    g.fillStyle = style.getPropertyValue("--text");
    g.fillRect(x(now), 0, 1.5, height);
    this.onDown?.(down);
  }
}

export function drawTake(canvas, notes, colour) {
  const scale = devicePixelRatio || 1, width = canvas.clientWidth || 220, height = canvas.clientHeight || 70;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const g = canvas.getContext("2d");
  g.scale(scale, scale);
  const length = Math.max(1000, ...notes.map(n => n[3] + n[4]));
  const pitches = notes.map(n => n[1]), low = Math.min(...pitches) - 2, high = Math.max(...pitches) + 2;
  g.fillStyle = colour;
  for (const [, pitch, , onset, duration] of notes)
    g.fillRect(onset / length * width, (high - pitch) / (high - low) * height, Math.max(2, duration / length * width), 3);
}

// The piano: mouse and touch play it, a finger may glide.
export class Keys {
  constructor(root, on, off) {
    Object.assign(this, { root, on, off, held: new Map(), keys: new Map() });
    this.build();
    addEventListener("resize", () => this.build());
    const pitchAt = event => {
      const key = document.elementFromPoint(event.clientX, event.clientY);
      return key?.parentElement === root ? Number(key.dataset.pitch) : null;
    };
    root.addEventListener("pointerdown", event => {
      root.setPointerCapture(event.pointerId);
      this.move(event.pointerId, pitchAt(event), event);
    });
    root.addEventListener("pointermove", event => {
      if (this.held.has(event.pointerId)) this.move(event.pointerId, pitchAt(event), event);
    });
    for (const end of ["pointerup", "pointercancel"])
      root.addEventListener(end, event => { this.move(event.pointerId, null, event); this.held.delete(event.pointerId); });
  }

  move(pointer, pitch, event) {
    const before = this.held.get(pointer) ?? null;
    if (before === pitch && event.type !== "pointerdown") return;
    if (before !== null) this.off(before);
    this.held.set(pointer, pitch);
    if (pitch === null) return;
    const box = this.keys.get(pitch).getBoundingClientRect();
    // Lower on the key is louder, as on most screens' pianos.
    this.on(pitch, Math.round(50 + 60 * Math.min(1, Math.max(0, (event.clientY - box.top) / box.height))));
  }

  build() {
    // On a narrow screen the middle of the piano, with keys as wide as a finger.
    const width = this.root.clientWidth || innerWidth;
    const octaves = Math.max(2, Math.min(7, Math.floor(width / 150)));
    const low = octaves >= 7 ? LOW : 60 - 12 * Math.floor(octaves / 2);
    const high = octaves >= 7 ? HIGH : low + 12 * octaves;
    const whites = [];
    for (let pitch = low; pitch <= high; pitch++) if (!isSharp(pitch)) whites.push(pitch);
    const size = 100 / whites.length;
    this.root.replaceChildren();
    this.keys.clear();
    let left = 0;
    for (let pitch = low; pitch <= high; pitch++) {
      const key = document.createElement("i");
      key.dataset.pitch = pitch;
      if (isSharp(pitch)) {
        key.className = "sharp";
        key.style.left = `${left - size * 0.3}%`;
        key.style.width = `${size * 0.6}%`;
      } else {
        key.style.left = `${left}%`;
        key.style.width = `${size}%`;
        left += size;
      }
      this.root.append(key);
      this.keys.set(pitch, key);
    }
  }

  show(down) {
    for (const [pitch, key] of this.keys) {
      const who = down.get(pitch);
      const name = (isSharp(pitch) ? "sharp " : "") + (who ?? "");
      if (key.className !== name) key.className = name;
    }
  }
}
