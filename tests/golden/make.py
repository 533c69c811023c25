"""Writes the files beside this one by running the reference on pieces made up here.

usage: python tests/golden/make.py     (needs ariautils, aria, torch, mido and NumPy installed)

Reference: EleutherAI/aria (b0486c8) and EleutherAI/aria-utils (e122d03), default configuration.
Every number of these files is the reference's; the pieces and weights are drawn from fixed seeds.
"""

import gzip
import json
from pathlib import Path

import arrays
import mido
import numpy as np
import torch
from aria import model as reference_model
from aria.config import load_config
from aria.inference import sample_min_p, sample_top_p
from aria.training.contrastive_finetune import symmetric_nt_xent_loss_cosine
from ariautils.midi import MidiDict, get_test_fn
from ariautils.tokenizer import AbsTokenizer

HERE = Path(__file__).parent
KEEP_SILENCE = ("late_start", "tempi")
SHORT = ("programs", "extremes")  # too short for the light filters
AUGMENTED, DETOKENIZED, PARSED = ("band", "pedal"), ("band", "pedal", "extremes"), ("tempi", "band")
FILTERED = (
    "note_density_in_interval", "note_timing_entropy", "note_pitch_entropy",
    "unique_pitch_count_in_interval", "unique_pitch_count", "silent_interval",
    "mean_note_velocity", "max_programs", "max_instruments", "total_note_frequency",
    "note_frequency_per_instrument", "length", "repetitive_content",
)  # fmt: skip


# --- pieces --------------------------------------------------------------------------------------


def voice(seed: int, n: int, channel: int, *, low=36, high=90, step=240, legato=1.0, first=0):
    """(tick, message) pairs of n notes of one channel, some of them chords."""
    random, at, events = np.random.RandomState(seed), first, []
    for i in range(n):
        pitch, velocity = int(random.randint(low, high)), int(random.randint(1, 128))
        length = max(1, int(step * legato * random.uniform(0.2, 3)))
        events.append((at, mido.Message("note_on", note=pitch, velocity=velocity, channel=channel)))
        off = mido.Message("note_off", note=pitch, velocity=0, channel=channel)
        events.append((at + length, off))
        at += int(random.choice([0, step // 4, step, 2 * step])) if i % 3 else step
    return events


def pedal(seed: int, until: int, channel: int):
    """(tick, message) pairs of a sustain pedal, with half values and a repeated press."""
    random, at, events = np.random.RandomState(seed), 100, []
    while at < until:
        value = int(random.choice([0, 10, 63, 64, 90, 127]))
        message = mido.Message("control_change", control=64, value=value, channel=channel)
        events.append((at, message))
        at += int(random.randint(50, 900))
    return events


def program(number: int, channel: int, at: int = 0):
    return [(at, mido.Message("program_change", program=number, channel=channel))]


def tempi(*changes: tuple[int, int]):
    return [(at, mido.MetaMessage("set_tempo", tempo=tempo)) for at, tempo in changes]


def pieces() -> dict[str, tuple[int, list[list]]]:
    """Ticks per beat and the tracks of every piece."""
    extremes = [
        (at, mido.Message(kind, note=note, velocity=velocity, channel=channel))
        for at, kind, note, velocity, channel in [
            (0, "note_on", 0, 1, 0), (20_000, "note_off", 0, 0, 0),
            (480, "note_on", 127, 127, 0), (481, "note_off", 127, 0, 0),
            (960, "note_on", 60, 64, 0), (960, "note_off", 60, 0, 0),
            (1000, "note_on", 60, 64, 0), (1200, "note_on", 60, 90, 0),
            (1500, "note_off", 60, 0, 0),
            (2000, "note_on", 34, 100, 9), (2010, "note_off", 34, 0, 9),
            (2000, "note_on", 35, 100, 9), (2010, "note_off", 35, 0, 9),
            (2400, "note_on", 81, 100, 9), (2410, "note_off", 81, 0, 9),
        ]
    ]  # fmt: skip
    band = [
        tempi((0, 480_000)),
        program(0, 0) + voice(1, 90, 0),
        program(33, 1) + voice(2, 60, 1, low=28, high=50, step=480),
        program(48, 2) + voice(3, 40, 2, step=960, legato=2.0),
        program(119, 3) + voice(4, 10, 3, step=960),
        voice(5, 80, 9, low=35, high=60),
    ]
    return {
        "pedal": (480, [tempi((0, 500_000)), voice(6, 260, 0) + pedal(7, 60_000, 0)]),
        "tempi": (
            96,
            [
                tempi((0, 600_000), (400, 350_000), (2_000, 900_000), (5_000, 250_000)),
                voice(8, 160, 0, step=60) + pedal(9, 8_000, 0),
            ],
        ),
        "band": (480, band),
        "late_start": (384, [voice(10, 60, 0, first=5_000), voice(11, 30, 0, first=60_000)]),
        "programs": (
            240,
            [
                program(4, 0) + voice(12, 40, 0, step=120) + program(73, 0, 3_000),
                voice(13, 40, 1, step=120) + program(40, 5),
            ],
        ),
        "extremes": (480, [tempi((0, 500_000)), extremes]),
        "fast": (480, [voice(14, 300, 0, step=100)]),
        "slow": (480, [voice(15, 90, 0, step=900, legato=1.5)]),
        "wide": (220, [voice(16, 150, 0, low=0, high=128, step=150) + pedal(17, 30_000, 0)]),
        "two_hands": (480, [voice(18, 120, 0, low=60), voice(19, 120, 1, high=60)]),
    }


def write_piece(path: Path, ticks_per_beat: int, tracks: list[list]) -> None:
    midi = mido.MidiFile(ticks_per_beat=ticks_per_beat, type=1)
    for events in tracks:
        track, now = mido.MidiTrack(), 0
        for at, message in sorted(events, key=lambda event: event[0]):
            track.append(message.copy(time=at - now))
            now = at
        midi.tracks.append(track)
    midi.save(path)


# --- what the reference makes of them ------------------------------------------------------------


def write(name: str, value: object) -> None:
    path = HERE / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n")


def tokens_of(name: str, **kwargs) -> list:
    midi = MidiDict.from_midi(HERE / "data" / f"{name}.mid")
    return AbsTokenizer().tokenize(midi, add_dim_tok=False, **kwargs)


def write_tokenizer(name: str) -> None:
    tokenizer = AbsTokenizer()
    ids = tokenizer.encode(tokens_of(name))
    start = ids.index(tokenizer.tok_to_id["<S>"])
    case = {
        "midi": f"{name}.mid",
        "prefix_ids": sorted(ids[:start]),
        "body_ids": ids[start:],
        "num_notes": len(MidiDict.from_midi(HERE / "data" / f"{name}.mid").note_msgs),
    }
    if name in KEEP_SILENCE:
        silent = tokenizer.encode(tokens_of(name, remove_preceding_silence=False))
        case["body_ids_keep_silence"] = silent[start:]
    write(f"tokenizer/{name}.json", case)


def sorted_prefix(name: str) -> list[int]:
    """Ids whose prefix, which the reference shuffles, is in ascending order."""
    case = json.loads((HERE / "tokenizer" / f"{name}.json").read_text())
    return case["prefix_ids"] + case["body_ids"]


def write_detokenize(name: str) -> None:
    tokenizer, ids = AbsTokenizer(), sorted_prefix(name)
    midi = tokenizer.detokenize(tokenizer.decode(ids))
    instrument = {m["channel"]: m["data"] for m in midi.instrument_msgs}
    notes = [
        [
            m["data"]["pitch"], m["data"]["start"], m["data"]["end"], m["data"]["velocity"],
            "drum" if m["channel"] == 9
            else midi.program_to_instrument[instrument[m["channel"]]],
        ]
        for m in midi.note_msgs
    ]  # fmt: skip
    write(f"detokenize/{name}.json", {"midi": f"{name}.mid", "ids": ids, "notes": notes})


def write_augment(name: str) -> None:
    tokenizer, ids = AbsTokenizer(), sorted_prefix(name)
    tokens = tokenizer.decode(ids)
    pitch = tokenizer.export_pitch_aug(5)
    velocity = tokenizer.export_velocity_aug(1)
    tempo = tokenizer.export_tempo_aug(0.2, mixup=False)
    write(
        f"augment/{name}.json",
        {
            "midi": f"{name}.mid",
            "ids": ids,
            "pitch": {str(n): tokenizer.encode(pitch(list(tokens), pitch_aug=n)) for n in (3, -5)},
            "velocity": {
                str(n): tokenizer.encode(velocity(list(tokens), aug_step=n)) for n in (1, -1)
            },
            "tempo": {
                str(f): tokenizer.encode(tempo(list(tokens), tempo_aug=f)) for f in (1.1, 0.85)
            },
        },
    )


def write_parsed(name: str) -> None:
    midi = MidiDict.from_midi(HERE / "data" / f"{name}.mid")

    def times(m: dict) -> list[int]:
        return [midi.tick_to_ms(m["data"]["start"]), midi.tick_to_ms(m["data"]["end"])]

    case = {
        "midi": f"{name}.mid",
        "ticks_per_beat": midi.ticks_per_beat,
        "tempo": [[m["tick"], m["data"]] for m in midi.tempo_msgs],
        "notes_ticks": [
            [*(m["data"][key] for key in ("pitch", "start", "end", "velocity")), m["channel"]]
            for m in midi.note_msgs
        ],
        "notes_ms": [times(m) for m in midi.note_msgs],
        "pedals": pedal_values(name),
    }
    midi.resolve_pedal()
    case["pedal_resolved_ms"] = sorted([m["data"]["pitch"], *times(m)] for m in midi.note_msgs)
    write(f"midi/{name}.json", case)


def pedal_values(name: str) -> list[list[int]]:
    """[tick, value, channel] of every sustain pedal event; the reference keeps down or up only."""
    events = []
    for track in mido.MidiFile(HERE / "data" / f"{name}.mid").tracks:
        now = 0
        for message in track:
            now += message.time
            if message.type == "control_change" and message.control == 64:
                events.append([now, message.value, message.channel])
    return sorted(events, key=lambda event: event[0])


def write_filters(names: list[str]) -> None:
    config = load_config()["data"]["tests"]
    arguments = {name: config[name]["args"] for name in FILTERED}
    results = {}
    for name in names:
        outcomes = results[f"{name}.mid"] = {}
        for test, args in arguments.items():
            midi = MidiDict.from_midi(HERE / "data" / f"{name}.mid")
            try:
                passed, value = get_test_fn(test)(midi, **args)
                outcomes[test] = [bool(passed), value]
            except Exception as error:
                outcomes[test] = ["error", type(error).__name__]
    write("filters.json", {"args": arguments, "results": results})


# --- model, losses, optimiser, sampling ----------------------------------------------------------

CLASSES = {"lm": "TransformerLM", "emb": "TransformerEMB", "cl": "TransformerCL",
           "lm_cnd": "TransformerLM_CND"}  # fmt: skip


def network(name: str) -> torch.nn.Module:
    net = getattr(reference_model, CLASSES[name])(reference_model.ModelConfig(**arrays.CONFIG))
    net.load_state_dict({k: torch.tensor(v) for k, v in arrays.weights(name).items()}, strict=True)
    return net.eval()


def write_model() -> None:
    random = np.random.RandomState(20)
    ids = np.array([sorted_prefix("pedal")[:128], sorted_prefix("band")[:128]])
    condition = random.standard_normal((2, 16)).astype(np.float32)
    chosen = np.sort(random.choice(arrays.CONFIG["vocab_size"], 200, replace=False))

    def ends(logits: torch.Tensor) -> np.ndarray:
        return np.concatenate([logits[:, :4], logits[:, -4:]], 1)[..., chosen]

    source, cnd = torch.tensor(ids), torch.tensor(condition)
    with torch.inference_mode():
        lm = network("lm")(source)
        nll = -torch.log_softmax(lm[:, :-1], -1).gather(-1, source[:, 1:, None])[..., 0]
        out = {
            "ids": ids,
            "logit_ids": chosen,
            "lm_logits_first4_last4": ends(lm),
            "lm_nll_per_token": nll.numpy(),
            "emb": network("emb")(source).numpy(),
            "cl": network("cl")(source).numpy(),
            "cnd_emb": condition,
            "cnd_logits_first4_last4": ends(network("lm_cnd")(source, cnd)),
            "cnd_logits_noemb_first4_last4": ends(network("lm_cnd")(source)),
        }
    (HERE / "model").mkdir(exist_ok=True)
    np.savez_compressed(HERE / "model" / "io.npz", **out)
    write("model/config.json", arrays.CONFIG)


def write_file_embeddings() -> None:
    from aria import embedding

    embedding.MAX_EMBEDDING_SEQ_LEN = 200
    found = {
        f"{name}.mid": embedding.get_global_embedding_from_midi(
            network("emb"),
            midi_path=HERE / "data" / f"{name}.mid",
            notes_per_chunk=80,
            device="cpu",
        ).tolist()
        for name in ("pedal", "tempi")
    }
    case = {"notes_per_chunk": 80, "max_seq_len": 200, "embeddings": found}
    write("model/file_embeddings.json", case)


def write_loss() -> None:
    random = np.random.RandomState(21)
    z1 = random.standard_normal((64, 32)).astype(np.float32)
    z2 = (0.5 * z1 + random.standard_normal((64, 32))).astype(np.float32)
    out = {"z1": z1, "z2": z2}
    for temperature in (0.5, 0.1, 0.05):
        a, b = (torch.tensor(z, requires_grad=True) for z in (z1, z2))
        loss = symmetric_nt_xent_loss_cosine(a, b, temperature)
        loss.backward()
        out[f"loss_{temperature}"] = np.float64(loss.item())
        out |= {f"dz1_{temperature}": a.grad.numpy(), f"dz2_{temperature}": b.grad.numpy()}
    np.savez_compressed(HERE / "loss.npz", **out)


def write_optimizer() -> None:
    """The reference's optimiser settings (aria/training/train.py) on one batch."""
    net = network("lm").train()
    rows = np.array([sorted_prefix("pedal")[:129], sorted_prefix("tempi")[:129]])
    rows[1, 100:] = pad = AbsTokenizer().tok_to_id["<P>"]
    source, target = torch.tensor(rows[:, :-1]), torch.tensor(rows[:, 1:])
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-5
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.000001, total_iters=10),
            torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, total_iters=20),
        ],
        milestones=[10],
    )
    losses, rates = [], []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(
            net(source).transpose(1, 2), target, ignore_index=pad
        )
        losses.append(loss.item())
        rates.append(schedule.get_last_lr()[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    norms = {name: p.norm().item() for name, p in net.named_parameters()}
    write(
        "optim.json",
        {
            "input": source.tolist(),
            "target": target.tolist(),
            "pad_id": pad,
            "loss": losses,
            "lr": rates,
            "final_param_norm": norms,
        },
    )


def kept(sample, logits: np.ndarray, p: float, temperature: float) -> list[int]:
    """Ids that a sampler can draw: the support of what it hands to torch.multinomial."""
    seen = []
    draw = torch.multinomial

    def spy(probabilities, num_samples):
        seen.append(probabilities)
        return draw(probabilities, num_samples)

    probs = torch.softmax(torch.tensor(logits)[None] / temperature, -1)
    order = torch.sort(probs, descending=True, dim=-1).indices[0]
    torch.multinomial = spy
    try:
        sample(probs, p)
    finally:
        torch.multinomial = draw
    positions = torch.nonzero(seen[0][0])[:, 0]
    by_rank = sample is sample_top_p  # it sorts first
    return (order[positions] if by_rank else positions).tolist()


def write_generate() -> None:
    prompt = sorted_prefix("pedal")[:100]
    ids = list(prompt)
    net = network("lm")
    with torch.inference_mode():
        for _ in range(64):
            ids.append(int(net(torch.tensor([ids]))[0, -1].argmax()))
    temperature, min_p, top_p = 0.98, 0.035, 0.95
    logits = arrays.sampling_logits()
    by_min_p = [sorted(kept(sample_min_p, row, min_p, temperature)) for row in logits]
    by_top_p = [kept(sample_top_p, row, top_p, temperature) for row in logits]
    write(
        "generate.json",
        {
            "prompt": prompt,
            "greedy": ids[100:],
            "temperature": temperature,
            "min_p": min_p,
            "top_p": top_p,
            "kept_min_p": by_min_p,
            "n_kept_top_p": [len(row) for row in by_top_p],
            "kept_top_p_sum": [sum(row) for row in by_top_p],
        },
    )


def main() -> None:
    (HERE / "data").mkdir(exist_ok=True)
    made = pieces()
    for name, (ticks_per_beat, tracks) in made.items():
        write_piece(HERE / "data" / f"{name}.mid", ticks_per_beat, tracks)
        write_tokenizer(name)
    with gzip.GzipFile(HERE / "vocab.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(AbsTokenizer().vocab).encode())
    for name in DETOKENIZED:
        write_detokenize(name)
    for name in AUGMENTED:
        write_augment(name)
    for name in PARSED:
        write_parsed(name)
    write_filters([name for name in made if name not in SHORT])
    write_model()
    write_file_embeddings()
    write_loss()
    write_optimizer()
    write_generate()


if __name__ == "__main__":
    main()
