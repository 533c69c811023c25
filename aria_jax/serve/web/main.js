// The page: what is played goes to the server, what the model plays is scheduled ahead.
import { Connection } from "./connection.js";
import { Keys, Roll, drawTake } from "./roll.js";
import { connectMidi } from "./midi.js";
import { Metronome, Sound } from "./sound.js";

const $ = id => document.getElementById(id);
const notes = [], marks = [];  // all that is drawn
const sounding = new Map();    // pitch -> my note and its sound
const answer = [];             // the model's notes of this turn, by index
const stats = { first: [], late: 0, played: 0 };
let turn = "none", nTurns = 0, canUndo = false, handedAt = null, octave = 0, takes = [];

const sound = new Sound();
const metronome = new Metronome(sound);
const settings = ["temperature", "min_p", "density", "length_ms", "silence_ms"];

const connection = new Connection({
  welcome(message) {
    $("model").textContent = message.model;
    for (const name of settings) if (!message.resumed) change(name); else $(name).value = message.settings[name];
    showOutputs();
    if (message.resumed && notes.length === 0)
      for (const [who, pitch, velocity, start, end] of message.history)
        if (who === 0) notes.push({ who: "you", pitch, velocity, start, end: end < 0 ? connection.now() : end });
    if (message.resumed)
      message.answer.forEach(([index, pitch, velocity, start, end]) => {
        if (!answer[index] || notes.length === 0) receive([index, pitch, velocity, start, end - start]);
      });
    show({ turn: message.turn, n_turns: message.n_turns, can_undo: message.can_undo });
  },
  turn(message) {
    if (message.turn === "model" && message.n_turns !== nTurns) { answer.length = 0; marks.push(message.t); handedAt = message.t; }
    if (message.turn === "player") marks.push(message.t);
    show(message);
  },
  notes(message) {
    if (message.turn !== nTurns && message.turn > nTurns) answer.length = 0;
    for (const note of message.notes) receive(note);
    if (message.first_ms !== null && message.notes.length) {
      // From the hand-over to the first sound, as the player hears it.
      stats.first.push({ ready: message.first_ms, heard: message.notes[0][3] - handedAt });
      const { ready, heard } = stats.first.at(-1);
      $("s_first").textContent = `${heard.toFixed(0)} ms after hand-over (ready in ${ready.toFixed(0)} ms)`;
    }
    $("s_speed").textContent = `${message.speed.toFixed(1)} × real time`;
  },
  keep(message) { drop(message.keep); },
  takes(message) { takes = message.takes; offerTakes(); },
  loaded(message) {
    for (const [, pitch, velocity, start, end] of message.rows) notes.push({ who: "you", pitch, velocity, start, end });
    say("Loaded: go on playing, or hand over.");
  },
  midi(message) {
    const bytes = Uint8Array.from(atob(message.data), letter => letter.charCodeAt(0));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([bytes], { type: "audio/midi" }));
    link.download = "duet.mid";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  },
  clock(message) { const rtt = connection.now() - message.t; connection.rtt = connection.rtt === null ? rtt : 0.8 * connection.rtt + 0.2 * rtt;
    $("s_rtt").textContent = `${connection.rtt.toFixed(0)} ms there and back`; },
  error(message) { say(message.message); },
  full(message) { say(message.message); },
  ended(message) { say(`${message.message}. Reload the page to begin anew.`); },
}, state => {
  if (state !== "open") show({ turn: "none", n_turns: nTurns, can_undo: false });
  $("turn").textContent = { lost: "Connection lost, trying again …", gone: "The session is over" }[state] ?? $("turn").textContent;
});

function say(text) {
  $("notice").textContent = text;
  $("notice").hidden = false;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { $("notice").hidden = true; }, 6000);
}

function show(state) {
  ({ turn, n_turns: nTurns, can_undo: canUndo } = state);
  document.body.dataset.turn = turn;
  if (turn !== "none") $("turn").textContent = turn === "player" ? "Your turn: play" : "Its turn: listen, or play to take over";
  $("hand").disabled = turn === "none";
  $("hand").firstChild.textContent = turn === "model" ? "Take over " : "Hand over ";
  $("undo").disabled = $("takes").disabled = !canUndo;
}

// --- the model plays ---

function receive([index, pitch, velocity, onset, duration]) {
  if (pitch === null) return;  // its pedal is in the notes' lengths
  const note = { who: "model", pitch, velocity, start: onset, end: onset + duration };
  const late = connection.now() - onset;
  stats.played++;
  if (late > 10) stats.late++;
  $("s_late").textContent = `${stats.late} of ${stats.played}`;
  note.sound = sound.play(pitch, velocity, connection.zero + onset, duration, "model");
  answer[index] = note;
  notes.push(note);
}

function drop(keep) {
  for (const note of answer.splice(keep)) {
    if (!note) continue;
    if (note.start > connection.now()) {
      sound.cancel(note.sound);
      notes.splice(notes.indexOf(note), 1);
    } else if (note.end > connection.now() && keep === 0) sound.stop(note.sound);
  }
}

// --- you play ---

function noteOn(pitch, velocity, ms = performance.now()) {
  sound.resume();
  if (turn === "none") return;
  noteOff(pitch, ms);
  const t = Math.max(0, Math.round(ms - connection.zero));
  const note = { who: "you", pitch, velocity, start: t, end: null };
  notes.push(note);
  sounding.set(pitch, { note, sound: sound.play(pitch, velocity, ms, null, "you") });
  connection.say("note_on", { pitch, velocity }, t);
  hideTakes();
}

let pedalDown = false;
const ringing = [];

function noteOff(pitch, ms = performance.now()) {
  const mine = sounding.get(pitch);
  if (!mine) return;
  sounding.delete(pitch);
  const t = Math.max(0, Math.round(ms - connection.zero));
  mine.note.end = t;
  if (pedalDown) ringing.push(mine.sound); else sound.stop(mine.sound);
  connection.say("note_off", { pitch }, t);
}

function pedal(value) {
  pedalDown = value >= 64;
  if (!pedalDown) for (const one of ringing.splice(0)) sound.stop(one);
  connection.say("pedal", { value });
}

function hand() {
  sound.resume();
  if (turn === "player") connection.say("hand_over", { lag: Math.min(1000, Math.round((connection.rtt ?? 0) / 2)) });
  else if (turn === "model") connection.say("take_over");
}

// --- controls ---

function change(name) {
  const value = Number($(name).value);
  connection.say("settings", { [name]: value });
}

function showOutputs() {
  for (const range of document.querySelectorAll("input[type=range]")) range.previousElementSibling.textContent = range.value;
}

for (const name of settings) $(name).addEventListener("change", () => change(name));
for (const range of document.querySelectorAll("input[type=range]")) range.addEventListener("input", showOutputs);
showOutputs();
$("volume").addEventListener("input", () => { sound.master.gain.value = Number($("volume").value); });
sound.master.gain.value = Number($("volume").value);
$("hand").addEventListener("click", hand);
$("undo").addEventListener("click", () => connection.say("undo"));
$("takes").addEventListener("click", () => { connection.say("takes"); say("Making three other answers …"); });
$("save").addEventListener("click", () => connection.say("save"));
for (const id of ["metronome", "bpm"])
  $(id).addEventListener("change", () => { sound.resume(); metronome.set($("metronome").checked, Number($("bpm").value) || 96); });
$("load").addEventListener("change", async event => {
  const file = event.target.files[0];
  if (!file) return;
  if (file.size > 1 << 20) { say("This file has more than 1 MiB."); return; }
  let text = "";
  for (const byte of new Uint8Array(await file.arrayBuffer())) text += String.fromCharCode(byte);
  connection.say("load", { data: btoa(text) });
  event.target.value = "";
});

function offerTakes() {
  $("choices").replaceChildren(...takes.map((take, number) => {
    const box = document.createElement("div"), canvas = document.createElement("canvas");
    const listen = document.createElement("button"), choose = document.createElement("button");
    listen.textContent = `Listen to ${number + 1}`;
    choose.textContent = "Take it";
    listen.onclick = () => audition(take);
    choose.onclick = () => pick(number);
    box.append(canvas, listen, " ", choose);
    setTimeout(() => drawTake(canvas, take, getComputedStyle(document.body).getPropertyValue("--model")));
    return box;
  }));
  $("choices").hidden = false;
  $("notice").hidden = true;
  $("choices").querySelector("button")?.focus();
}

let auditioned = [];
function audition(take) {
  sound.resume();
  for (const one of auditioned) { sound.cancel(one); sound.stop(one); }
  const first = take.length ? take[0][3] : 0, begin = performance.now() + 80;
  auditioned = take.map(([, pitch, velocity, onset, duration]) =>
    sound.play(pitch, velocity, begin + onset - first, duration, "model"));
}

function pick(number) {
  connection.say("choose", { take: number });
  for (const note of answer.splice(0)) if (note) notes.splice(notes.indexOf(note), 1);
  const chosen = takes[number].filter(([, pitch]) => pitch !== null);
  const shift = connection.now() - Math.max(0, ...chosen.map(([, , , onset, duration]) => onset + duration));
  for (const [, pitch, velocity, onset, duration] of chosen)
    notes.push({ who: "model", pitch, velocity, start: onset + shift, end: onset + shift + duration });
  hideTakes();
  say(`Answer ${number + 1} it is: go on playing.`);
}

function hideTakes() {
  for (const one of auditioned.splice(0)) { sound.cancel(one); sound.stop(one); }
  $("choices").hidden = true;
}

// --- the computer's keyboard: by place, not by letter, so that every layout plays ---

const PLACES = ["KeyA", "KeyW", "KeyS", "KeyE", "KeyD", "KeyF", "KeyT", "KeyG", "KeyY", "KeyH", "KeyU", "KeyJ", "KeyK",
  "KeyO", "KeyL", "KeyP", "Semicolon", "Quote"];
const pressed = new Map();

addEventListener("keydown", event => {
  const field = event.target.closest?.("input:not([type=checkbox]):not([type=file]), select, textarea");
  if (field || event.ctrlKey || event.altKey || event.metaKey) return;
  const place = PLACES.indexOf(event.code);
  if (place >= 0) {
    event.preventDefault();
    if (event.repeat || pressed.has(event.code)) return;
    const pitch = 60 + 12 * octave + place;
    pressed.set(event.code, pitch);
    noteOn(pitch, 72, event.timeStamp || performance.now());
  } else if (event.code === "Space") {
    if (event.target.closest?.("button, summary, a, label") && event.target.id !== "hand") return;
    event.preventDefault();
    if (!event.repeat) hand();
  } else if (event.repeat) return;
  else if (event.code === "Backspace") connection.say("undo");
  else if (event.code === "Digit3" && canUndo) $("takes").click();
  else if (event.code === "KeyZ") octave = Math.max(-3, octave - 1);
  else if (event.code === "KeyX") octave = Math.min(3, octave + 1);
  else if (event.key === "Shift") pedal(127);
});
addEventListener("keyup", event => {
  if (pressed.has(event.code)) { noteOff(pressed.get(event.code), event.timeStamp || performance.now()); pressed.delete(event.code); }
  if (event.key === "Shift" && pedalDown) pedal(0);
  if (event.code === "Space" && event.target.id === "hand") event.preventDefault();
});
addEventListener("blur", () => {
  for (const pitch of [...sounding.keys()]) noteOff(pitch);
  pressed.clear();
  if (pedalDown) pedal(0);
});
addEventListener("pointerdown", () => sound.resume());

const keys = new Keys($("keys"), noteOn, noteOff);
const roll = new Roll($("roll"), notes, () => connection.now(), marks);
roll.onDown = down => keys.show(down);
connectMidi({ $, noteOn, noteOff, pedal, hand, sound, say });

setInterval(() => {
  const last = answer.at(-1);
  $("s_buffer").textContent = turn === "model" && last ? `${Math.max(0, (last.start - connection.now()) / 1000).toFixed(1)} s` : "–";
  const old = connection.now() - 60_000;
  while (notes.length > 2000 && (notes[0].end ?? Infinity) < old) notes.shift();
}, 250);
sound.load((done, total) => { if (done === total && sound.failed) say(`A plain tone sounds instead of the piano (${sound.failed}).`); });

// For tests and the curious: what is scheduled, and what was measured.
window.duet = { sound, notes, stats, connection, answer, get turn() { return turn; } };
