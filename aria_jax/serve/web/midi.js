// Web MIDI, where the browser has it: keyboards in, pedals, and any instrument as output.
export async function connectMidi({ $, noteOn, noteOff, pedal, hand, sound, say }) {
  if (!navigator.requestMIDIAccess) {
    $("midi_in").replaceChildren(new Option("this browser has no Web MIDI", ""));
    return;
  }
  let access;
  try {
    access = await navigator.requestMIDIAccess();
  } catch {
    $("midi_in").replaceChildren(new Option("MIDI was not allowed", ""));
    return;
  }
  let input = null;

  const hear = event => {
    const [status, first, second] = event.data;
    const ms = event.timeStamp || performance.now();
    switch (status & 0xf0) {
      case 0x90: if (second > 0) { if (first >= 21 && first <= 108) noteOn(first, second, ms); break; }  // falls through
      case 0x80: noteOff(first, ms); break;
      case 0xb0:
        if (first === 64) pedal(second);
        else if (String(first) === $("hand_pedal").value && second >= 64) hand();
    }
  };

  function choose(id) {
    if (input) input.onmidimessage = null;
    input = access.inputs.get(id) ?? null;
    if (input) input.onmidimessage = hear;
  }

  function list() {
    const ins = [...access.inputs.values()].filter(one => one.state !== "disconnected");
    const outs = [...access.outputs.values()].filter(one => one.state !== "disconnected");
    const before = $("midi_in").value;
    $("midi_in").replaceChildren(new Option("none", ""), ...ins.map(one => new Option(one.name, one.id)));
    $("midi_out").replaceChildren(new Option("sound of this page", ""), ...outs.map(one => new Option(one.name, one.id)));
    // The first keyboard that is there is taken: nobody should have to look for it.
    const wanted = ins.find(one => one.id === before) ?? ins.find(one => !/through/i.test(one.name)) ?? null;
    $("midi_in").value = wanted?.id ?? "";
    if (wanted && wanted !== input) say(`MIDI keyboard: ${wanted.name}`);
    choose(wanted?.id);
  }

  access.onstatechange = list;
  $("midi_in").addEventListener("change", () => choose($("midi_in").value));
  $("midi_out").addEventListener("change", () => { sound.out = access.outputs.get($("midi_out").value) ?? null; });
  list();
}
