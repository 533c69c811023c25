"""train, compile, convert, demo, serve."""

import pytest

from tests.first_hour.uses import Use, wrong

SMALL = "d_model=16 n_heads=2 n_layers=1 seq_len=32 global_batch=8 warmup_steps=0"
PRETRAIN = "train pretrain --data {data} --workdir run"

TRAIN = [
    Use(f"{PRETRAIN} {SMALL} steps=3", ("starting from scratch", "step 3"), made="run/config.yaml"),
    Use(f"{PRETRAIN} {SMALL} --config c.yaml --dry-run", "3 steps",
        before=(("c.yaml", "steps: 3"),)),
    Use("train --settings", ("peak_lr=0.0003", "Learning rate at the end of the warm-up")),
    Use(f"{PRETRAIN} --dry-run --on v5p:64 --preset medium",
        ("time", "GiB per device", "computed in  bfloat16")),
    Use("train --status run", ("run: step 7, not running", "goodput"),
        before=(("run/goodput.jsonl", '{"event": "start", "time": 1, "step": 7}'),)),
    wrong("train --status {nothing}", ("nothing: no such folder", "--workdir")),
    wrong("train --status {empty}", ("empty: no record of a run here", "--workdir")),
    wrong("train --status {empty} steps=3", "unknown argument steps=3"),
    wrong("train --status", "--status: expected one argument"),
    wrong("train --profile-next 3 {empty}", "empty: no record of a run here"),
    wrong("train --profile-next 3", "required: WORKDIR"),
    wrong("train pretrain --data {data} --workdir {midi}", "holds MIDI files"),
    wrong("train pretrain --data {data} --workdir mine", "holds a corpus",
          before=(("mine/manifest.json", "{}"),)),
    wrong(f"{PRETRAIN} --steps 5", "did you mean steps=5?"),
    wrong(f"{PRETRAIN} stesp=5", "nearest: steps"),
    wrong(f"{PRETRAIN} n_heads=0 log_every=0 seed=-1",
          ("model.n_heads=0", "train.log_every=0", "train.seed=-1")),
    wrong(f"{PRETRAIN} --preset tinny", "did you mean 'tiny'?"),
    wrong("train pretrian --data {data} --workdir run", "did you mean 'pretrain'?"),
    wrong("train classify --data {data} --workdir run", "data.label=NAME"),
    wrong("train classify --data {data} --workdir run label=composr",
          ("composr", "did you mean 'composer'?")),
    wrong("train pretrain --data {midi} --workdir run", "no token shards here"),
    wrong("train pretrain --data {nothing} --workdir run", "no such folder"),
    wrong("train pretrain --data {data} --workdir afile", "is a file", before=(("afile", "x"),)),
    Use(f"{PRETRAIN} {SMALL} --dry-run --on v5p:8 hardness=1 min_slice_notes=9",
        ("hardness=1 has no effect: it is for contrastive",
         "min_slice_notes=9 has no effect: it is for contrastive and classify")),
    wrong(f"{PRETRAIN} --init-from {{nothing}}", ("--init-from", "nothing")),
    wrong(f"{PRETRAIN} --config none.yaml", "none.yaml: no such file"),
    wrong(f"{PRETRAIN} {SMALL} mesh.tensor=3", "mesh.tensor=3"),
    wrong(f"{PRETRAIN} --dry-run --on v5p", "expected CHIP:COUNT"),
    wrong(f"{PRETRAIN} --on v5p:8", "--on has no effect without --dry-run"),
    wrong(f"{PRETRAIN} --dry-run --assumed-mfu 2", "--assumed-mfu 2"),
    wrong("train contrastive --data {data} --workdir run label=composer",
          "task classify needs data.label=NAME (see `aria-jax data inspect`), no other does"),
    wrong("train pretrain --data {data} --workdir ''", "an argument is empty"),
    wrong(f"{PRETRAIN} --config c.yaml", ("c.yaml: ", "nearest: steps"),
          before=(("c.yaml", "stesp: 3"),)),
    wrong("train pretrain --data {data} --workdir {data}/run", ("lies in", "folder outside")),
    wrong("train pretrain --data d --workdir run", "says nothing of splits",
          before=(("d/manifest.json", '{"format_version": 1}'),)),
]  # fmt: skip

COMPILE = [
    Use("compile --help", ("usage: aria-jax compile", "example")),
    Use(f"compile --preset tiny --topology v5e:2x2 {SMALL}", ("memory", "GiB per chip"),
        needs="libtpu"),
    Use(f"compile --preset tiny --topology v5e:2x2 --task embed --json {SMALL}", '"memory"',
        needs="libtpu"),
    wrong("compile --preset tiny --topology v5p", "v5p"),
    wrong("compile --preset tinny --topology v5p:2x2x1", "did you mean 'tiny'?"),
    wrong("compile --preset tiny --topology v9:2x2x1", "v9"),
    wrong("compile --preset tiny --on v5p:2x2x1", "unknown argument --on"),
    wrong("compile --preset tiny --topology v5p:2x2x1 --mesh 1,2", "--mesh 1,2"),
    wrong("compile --preset tiny --topology h100:0", ("h100:0", "h100:8")),
    wrong("compile --preset tiny --task pretrian", "did you mean 'pretrain'?"),
    wrong("compile --preset tiny stesp=3", "nearest: steps"),
    wrong("compile --preset tiny --remat dots", "did you mean remat=dots?"),
]  # fmt: skip

CONVERT = [
    Use("convert to-safetensors {lm} m.safetensors", "m.safetensors", made="m.safetensors"),
    Use("convert to-safetensors {encoder} m.safetensors", "parameters", made="m.safetensors"),
    Use("convert to-hub {lm} mine", "parameters", made=("mine/config.json", "mine/README.md")),
    Use("convert --help", "from-safetensors"),
    wrong("convert to-hub {lm} mine.zip", "is a file, or named like one"),
    wrong("convert to-hub hf://one mine", "expected hf://OWNER/NAME"),
    wrong("convert to-safetensors {lm} m.bin", "m.bin"),
    wrong("convert to-safetensors {empty} m.safetensors", "no checkpoint here"),
    wrong("convert from-safetensors {nothing}.safetensors out", "nothing.safetensors"),
    wrong("convert from-safetensors {text} out", "text.mid"),
    wrong("convert adapters {lm} a.safetensors", "no adapters"),
    wrong("convert to-safetensor {lm} m.safetensors", "did you mean 'to-safetensors'?"),
]

DEMO = [
    Use("demo --help", ("usage: aria-jax demo", "example")),
    wrong("demo", "required: out"),
    wrong("demo afile", "is a file", before=(("afile", "x"),)),
    wrong("demo out --midi {nothing}", ("nothing", "no such folder")),
    wrong("demo out --midi {empty}", "no MIDI files"),
    wrong("demo out --worker 2 --zzz", "unknown argument --zzz"),
    wrong("demo {data}", "holds a corpus"),
    wrong("demo {midi}", "holds MIDI files"),
    wrong("demo out --workers 0", "--workers 0 must be at least 1"),
    wrong("demo {midi}/out --midi {midi}", "lies in"),
]


SERVE = [
    Use("serve --help", ("usage: aria-jax serve", "example")),
    wrong("serve --host 0.0.0.0", ("--host 0.0.0.0", "--token")),
    wrong("serve --token short", "at least 8 letters"),
    wrong("serve --players 0", "--players 0"),
    wrong("serve --port 70000", "--port 70000"),
    wrong("serve --checkpoint {nothing}", "no checkpoint here"),
    wrong("serve --embeddings {nothing} --port 0", ("nothing", "no such file")),
    wrong("serve --prot 1", "did you mean '--port'?"),
    wrong("serve --save afile/new", ("afile/new", "a file is here"), before=(("afile", "x"),)),
    wrong("serve --embeddings {text} --port 0", ("text.mid", "not made by `aria-jax embed`")),
]


@pytest.mark.parametrize("use", [*TRAIN, *COMPILE, *CONVERT, *DEMO, *SERVE], ids=str)
def test_a_newcomer_finds_what_the_table_says(use, run_use):
    run_use(use)
