"""A study from clips to p-values."""

import json
import re
import shutil

import numpy as np
import pytest

from aria_jax.cli.main import main
from data_pipeline.midi import NOTE, Performance, write_midi

OURS, OTHERS = "oursystem", ("rivalone", "rivaltwo")


def run(capsys, *arguments):
    status = main(["listening-test", *map(str, arguments)])
    output = capsys.readouterr()
    return status, output.out, output.err


@pytest.fixture
def study(tmp_path, capsys):
    """3 systems, one of them with sound files, 4 prompts, 6 judges."""
    rng = np.random.default_rng(0)
    for system in (OURS, *OTHERS):
        (tmp_path / "clips" / system).mkdir(parents=True)
        for prompt in range(4):
            file = tmp_path / "clips" / system / f"prompt{prompt}"
            if system == OTHERS[1]:
                file.with_suffix(".wav").write_bytes(rng.bytes(100))
                continue
            notes = np.zeros(90, NOTE)
            notes["start"] = np.arange(90) * 1000
            notes["end"] = notes["start"] + 500
            notes["pitch"], notes["velocity"] = rng.integers(40, 80, 90), 70
            notes["pitch"][:16] = 50 + prompt + np.arange(16)  # the prompt: 15 s
            write_midi(Performance(500, notes), file.with_suffix(".mid"))
    status, out, _ = run(
        capsys, "make", tmp_path / "clips", tmp_path / "study", "--ours", OURS, "--judges", 6
    )
    assert status == 0 and "key.json" in out and (tmp_path / "study" / "key.json").is_file()
    return tmp_path / "study"


def ballots(study, choose):
    """Votes of every judge; `choose` maps a trial of the key to a choice."""
    key = json.loads((study / "key.json").read_text())
    paths = []
    for judge in range(6):
        votes = {t["id"]: choose(t) for t in key["trials"] if t["judge"] == judge}
        path = study / f"votes-{judge + 1:03d}.json"
        content = {"study": key["study"], "judge": f"{judge + 1:03d}", "votes": votes}
        path.write_text(json.dumps(content))
        paths.append(path)
    return paths


def preferring_ours(trial):
    return "first" if trial["ours_first"] else "second"


def test_pages_name_no_system_and_hold_a_minute(study):
    key = json.loads((study / "key.json").read_text())
    for judge in range(6):
        page = (study / f"judge-{judge + 1:03d}.html").read_text()
        assert not any(name in page for name in (OURS, *OTHERS))
        asked = [t["id"] for t in key["trials"] if t["judge"] == judge]
        assert all(f'name="{trial}"' in page for trial in asked)
        for data in re.findall(r'<script type="application/json">(.*?)</script>', page):
            starts = [note[0] for note in json.loads(data)["notes"]]
            assert json.loads(data)["marks"] == [[15.0, "the prompt ends"]]
            assert max(starts) == 59.0 and len({note[4] for note in json.loads(data)["notes"]}) == 1
        for source in re.findall(r'src="(.*?)"', page):
            assert (study / source).is_file()


def test_unanimous_votes(study, capsys):
    paths = ballots(study, preferring_ours)
    status, out, _ = run(capsys, "analyse", study / "key.json", *paths, "--json")
    result = json.loads(out)
    assert status == 0 and result["judges"] == 6
    for comparison, name in zip(result["comparisons"], OTHERS, strict=True):
        assert comparison["opponent"] == name
        assert (comparison["wins"], comparison["losses"]) == (6, 0)
        assert comparison["p_value"] == pytest.approx(2 / 2**6)


def test_always_choosing_the_first_clip_says_nothing(study, capsys):
    paths = ballots(study, lambda trial: "first")
    _, out, _ = run(capsys, "analyse", study / "key.json", *paths, "--json")
    for comparison in json.loads(out)["comparisons"]:
        assert comparison["wins"] == comparison["losses"] == 3  # the sides are balanced


def test_ballots_that_cannot_be_right(study, capsys):
    paths = ballots(study, preferring_ours)
    content = json.loads(paths[0].read_text())

    def message(changed):
        paths[0].write_text(json.dumps(changed))
        status, _, err = run(capsys, "analyse", study / "key.json", *paths)
        assert status == 2
        return err

    assert "votes of study" in message({**content, "study": "other"})
    second = json.loads(paths[1].read_text())
    assert "has voted already" in message(second)
    assert "no trial of judge" in message({**content, "votes": {"t9999": "tie"}})
    assert "not a judge's votes" in message({"votes": 3})
    rest = dict(list(content["votes"].items())[1:])
    assert "judgements, but 6" in message({**content, "votes": rest})
    status, _, err = run(capsys, "analyse", paths[1], *paths)
    assert status == 2 and "not the key" in err


def test_studies_that_cannot_be_made(study, capsys, tmp_path):
    clips = tmp_path / "clips"
    status, _, err = run(capsys, "make", clips, study, "--ours", OURS, "--judges", 2)
    assert status == 2 and "judges: 6 → 2" in err and "--overwrite" in err
    status, _, err = run(capsys, "make", clips, tmp_path / "b", "--ours", "nobody", "--judges", 2)
    assert status == 2 and "nobody" in err
    status, _, err = run(capsys, "make", study, tmp_path / "b", "--ours", OURS, "--judges", 2)
    assert status == 2 and "two systems" in err


def test_a_pair_must_begin_with_the_same_prompt(study, capsys, tmp_path):
    clips = tmp_path / "clips"
    arguments = ("make", clips, tmp_path / "b", "--ours", OURS, "--judges", 6)
    _, _, err = run(capsys, *arguments)
    assert "4 pairs hold sound files" in err  # said, not checked
    status, _, err = run(capsys, *arguments[:2], tmp_path / "c", *arguments[3:],
                         "--prompt-seconds", 30)  # fmt: skip
    assert status == 2 and "prompt0 (oursystem and rivalone)" in err and "30 s" in err
    shutil.copy(clips / OURS / "prompt3.mid", clips / OTHERS[0] / "prompt2.mid")
    status, _, err = run(capsys, *arguments[:2], tmp_path / "c", *arguments[3:])
    assert status == 2 and "prompt2 (oursystem and rivalone)" in err and "prompt1" not in err
    assert not (tmp_path / "c").exists()
    status, _, err = run(capsys, *arguments[:2], tmp_path / "c", *arguments[3:],
                         "--prompt-seconds", 60)  # fmt: skip
    assert status == 2 and "--prompt-seconds 60" in err


def test_judgements_that_do_not_fit_the_participants(study, capsys):
    """The rows of the paper sum to 44, 48, 50 and 41 of 46 participants."""
    status, out, _ = run(capsys, "counts", 38, 0, 6, "--participants", 46)
    assert status == 0 and "44 of the 46" in out and "2 are missing" in out
    status, _, err = run(capsys, "counts", 49, 1, 0, "--participants", 46)
    assert status == 2 and "50 judgements of 46 participants" in err
    paths = ballots(study, preferring_ours)
    _, out, _ = run(capsys, "analyse", study / "key.json", *paths[:4])
    assert "4 of the 6 judges" in out


def test_counts(capsys):
    status, out, _ = run(capsys, "counts", 38, 0, 6, "--judgements", 44)
    assert status == 0 and "9.43e-07" in out
    status, _, err = run(capsys, "counts", 38, 0, 6, "--judgements", 46)
    assert status == 2 and "44 judgements, but 46" in err


def test_compare(study, capsys, tmp_path):
    clips = tmp_path / "clips"
    (clips / OURS / "broken.mid").write_text("no")
    status, out, err = run(capsys, "compare", clips / OURS, clips / OTHERS[0], "--json")
    result = json.loads(out)
    assert status == 0 and "broken.mid" in err
    assert result["generated"]["n"] == result["reference"]["n"] == 4
    assert result["generated"]["notes_per_second"]["mean"] == pytest.approx(1.0)
