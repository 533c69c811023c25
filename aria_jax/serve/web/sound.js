// The sampled piano, and when what sounds: everything is scheduled ahead on the audio clock.
const SAMPLES = { A0: 21, C1: 24, Fs1: 30, C2: 36, Fs2: 42, C3: 48, Fs3: 54, C4: 60, Fs4: 66, C5: 72, Fs5: 78,
  C6: 84, Fs6: 90, C7: 96, Fs7: 102, C8: 108 };
const RELEASE_S = 0.09;

export class Sound {
  constructor() {
    this.context = new AudioContext({ latencyHint: "interactive" });
    this.master = this.context.createGain();
    const limiter = this.context.createDynamicsCompressor();
    this.master.connect(limiter).connect(this.context.destination);
    this.buffers = new Map();
    this.scheduled = [];  // {pitch, when, owner, source, gain, end}; tests read it back
    this.out = null;      // a MIDI output that sounds instead
    this.outNotes = new Map();
    this.offsets = [];    // audio time less page time, s, as lately read
    this.context.onstatechange = () => { this.offsets = []; };
    setInterval(() => this.readClock(), 100);
  }

  async load(progress) {
    let done = 0;
    const names = Object.keys(SAMPLES).sort((a, b) => Math.abs(SAMPLES[a] - 63) - Math.abs(SAMPLES[b] - 63));
    for (const name of names) {
      try {
        const answer = await fetch(`piano/${name}.ogg`);
        this.buffers.set(SAMPLES[name], await this.context.decodeAudioData(await answer.arrayBuffer()));
      } catch (error) {
        this.failed = `${name}: ${error.message || error}`;  // a plain tone sounds instead
      }
      progress(++done, names.length);
    }
  }

  resume() {
    if (this.context.state !== "running") this.context.resume();
  }

  readClock() {
    const stamp = this.context.getOutputTimestamp?.();
    const offset = stamp && stamp.performanceTime > 0
      ? stamp.contextTime - stamp.performanceTime / 1000
      : this.context.currentTime - performance.now() / 1000;
    if (this.offsets.length && Math.abs(offset - this.offset) > 0.05) this.offsets = [];  // it stood still
    this.offsets.push(offset);
    if (this.offsets.length > 25) this.offsets.shift();
    // A reading is off by up to a buffer, and notes would be against each other: the median is not.
    this.offset = this.offsets.toSorted((a, b) => a - b)[this.offsets.length >> 1];
  }

  // The audio time of a moment on the page's clock, ms.
  at(ms) {
    if (!this.offsets.length) this.readClock();
    return ms / 1000 + this.offset;
  }

  // Starts a note at page time `ms`; durationMs null sounds until `stop`. Returns a handle.
  play(pitch, velocity, ms, durationMs, owner) {
    const late = performance.now() - ms;
    const when = Math.max(this.at(ms), this.context.currentTime);
    if (this.out) return this.#playOut(pitch, velocity, ms, durationMs, owner, late);
    const gain = this.context.createGain();
    gain.gain.value = Math.pow(velocity / 127, 1.5) * 1.1;
    gain.connect(this.master);
    let nearest = null;
    for (const sample of this.buffers.keys())
      if (nearest === null || Math.abs(sample - pitch) < Math.abs(nearest - pitch)) nearest = sample;
    let source;
    if (nearest !== null) {
      source = this.context.createBufferSource();
      source.buffer = this.buffers.get(nearest);
      source.playbackRate.value = Math.pow(2, (pitch - nearest) / 12);
    } else {
      source = this.context.createOscillator();
      source.type = "triangle";
      source.frequency.value = 440 * Math.pow(2, (pitch - 69) / 12);
      gain.gain.setTargetAtTime(0, when, 1.2);
    }
    source.connect(gain);
    source.start(when);
    const note = { pitch, when, owner, source, gain, end: null, late };
    if (durationMs !== null) this.#release(note, when + durationMs / 1000);
    source.onended = () => { gain.disconnect(); this.scheduled = this.scheduled.filter(one => one !== note); };
    this.scheduled.push(note);
    return note;
  }

  #release(note, when) {
    note.end = when;
    note.gain.gain.setTargetAtTime(0, when, RELEASE_S);
    note.source.stop(when + RELEASE_S * 8);
  }

  stop(note) {
    if (!note || note.end !== null) return;
    if (note.out) { note.out.send([0x80, note.pitch, 0]); note.end = 0; return; }
    this.#release(note, this.context.currentTime);
  }

  // What has not begun will not; what sounds is left to end.
  cancel(note) {
    if (!note) return;
    if (note.out) { clearTimeout(note.timer); clearTimeout(note.off); return; }
    if (note.when > this.context.currentTime + 0.005) {
      note.source.onended = null;
      try { note.source.stop(); } catch { /* it had not begun */ }
      note.gain.disconnect();
      this.scheduled = this.scheduled.filter(one => one !== note);
    }
  }

  #playOut(pitch, velocity, ms, durationMs, owner, late) {
    const out = this.out, note = { pitch, when: this.at(ms), owner, out, end: null, late };
    if (owner === "you") return note;  // the keyboard sounds by itself
    note.timer = setTimeout(() => {
      out.send([0x90, pitch, velocity]);
      if (durationMs !== null) note.off = setTimeout(() => out.send([0x80, pitch, 0]), durationMs);
    }, Math.max(0, ms - performance.now()));
    return note;
  }

  click(when, strong) {
    const oscillator = this.context.createOscillator(), gain = this.context.createGain();
    oscillator.frequency.value = strong ? 1760 : 1175;
    gain.gain.setValueAtTime(0.25, when);
    gain.gain.exponentialRampToValueAtTime(0.001, when + 0.05);
    oscillator.connect(gain).connect(this.master);
    oscillator.start(when);
    oscillator.stop(when + 0.06);
  }
}

// Off until it is switched on; ticks are scheduled ahead like everything else.
export class Metronome {
  constructor(sound) { this.sound = sound; this.timer = null; }
  set(on, bpm) {
    clearInterval(this.timer);
    if (!on) return;
    let beat = 0, next = this.sound.context.currentTime + 0.1;
    this.timer = setInterval(() => {
      while (next < this.sound.context.currentTime + 0.4) {
        this.sound.click(next, beat++ % 4 === 0);
        next += 60 / bpm;
      }
    }, 100);
  }
}
