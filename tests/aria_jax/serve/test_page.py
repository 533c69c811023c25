"""The page in a real browser: played on the computer's keyboard, heard, saved, lost and found."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from websockets.sync.client import connect

from aria_jax.checkpoints.models import save_model
from aria_jax.serve.app import Models
from aria_jax.serve.studio import Studio
from data_pipeline.midi import read_midi
from tests.aria_jax.serve.test_serve import serving

pytestmark = pytest.mark.slow
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FAKE_MIDI = """
navigator.requestMIDIAccess = async () => {
  const input = { id: "k", name: "a keyboard", state: "connected", onmidimessage: null };
  const sent = [];
  const send = data => sent.push([...data]);
  const output = { id: "o", name: "a piano", state: "connected", send };
  const play = data => input.onmidimessage({ data, timeStamp: performance.now() });
  window.midi = { input, sent, play };
  return { inputs: new Map([["k", input]]), outputs: new Map([["o", output]]) };
};
"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        arguments = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = running.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def port(duet_engine):
    with serving(Models(Studio(duet_engine, "standard", about="a test"), "standard")) as port:
        yield port


@pytest.fixture
def page(browser, port):
    """A page that is ready; errors in it fail the test."""
    # The page's own policy forbids the `eval` by which tests wait; it is held to it below.
    context = browser.new_context(viewport={"width": 1000, "height": 800}, bypass_csp=True)
    page = context.new_page()
    page.set_default_timeout(30_000)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(request.url))
    page.add_init_script(FAKE_MIDI)
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("body[data-turn=player]")
    page.wait_for_function("duet.sound.buffers.size === 16")
    yield page
    page.evaluate("duet.connection.say('bye')")
    page.wait_for_timeout(200)
    context.close()
    assert not errors


def play(page, keys: str = "asdf") -> None:
    for key in keys:
        page.keyboard.down(key)
        page.wait_for_timeout(60)
        page.keyboard.up(key)


def hand_over(page) -> None:
    page.keyboard.press("Space")
    page.wait_for_selector("body[data-turn=model]")
    page.wait_for_function("duet.answer.length > 2")


def test_played_handed_over_heard_and_taken_over(page):
    play(page)
    assert page.evaluate("duet.notes.map(note => note.pitch)") == [60, 62, 64, 65]
    assert page.evaluate("duet.notes.every(note => note.end !== null)")
    hand_over(page)
    # What sounds is scheduled on the audio clock, at the time that the model gave it.
    off = page.evaluate(
        """() => duet.sound.scheduled.filter(one => one.owner === 'model').map(one => {
             const note = duet.answer.find(other => other && other.sound === one);
             return 1000 * (one.when - duet.sound.at(duet.connection.zero + note.start));
           }).filter((_, index) => index > 0)"""
    )
    assert all(abs(ms) < 30 for ms in off)
    assert page.evaluate("duet.stats.first.length") == 1
    page.keyboard.down("a")  # playing takes over
    page.wait_for_selector("body[data-turn=player]")
    page.keyboard.up("a")
    now = page.evaluate("duet.connection.now()")
    later = page.evaluate("duet.notes.filter(n => n.who === 'model').map(n => n.start)")
    assert all(start <= now for start in later)


def test_undo_other_answers_and_the_saved_file(page, tmp_path):
    play(page)
    hand_over(page)
    page.select_option("#length_ms", "4000")
    page.click("#takes")
    page.wait_for_selector("#choices div:nth-child(3) canvas")
    page.click("#choices div:nth-child(2) button:nth-of-type(2)")
    assert page.is_hidden("#choices")
    drawn = page.evaluate("duet.notes.filter(note => note.who === 'model').length")
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "duet.mid")
    saved = read_midi(tmp_path / "duet.mid")
    assert saved.notes["pitch"][saved.notes["channel"] == 0].tolist() == [60, 62, 64, 65]
    assert (saved.notes["channel"] == 1).sum() == drawn  # the answer that was chosen
    page.keyboard.press("Backspace")
    page.wait_for_selector("#undo[disabled]")
    page.set_input_files("#load", tmp_path / "duet.mid")
    page.wait_for_function("document.getElementById('notice').textContent.startsWith('Loaded')")


def test_a_lost_connection_comes_back_with_its_session(page):
    play(page)
    session = page.evaluate("duet.connection.session")
    page.evaluate("duet.connection.socket.close()")
    page.wait_for_selector("body[data-turn=none]")
    page.wait_for_selector("body[data-turn=player]")
    assert page.evaluate("duet.connection.session") == session
    hand_over(page)
    page.reload()
    page.wait_for_selector("body[data-turn=model]")
    assert page.evaluate("duet.connection.session") == session
    page.wait_for_function("duet.notes.some(note => note.who === 'you')")


def test_a_midi_keyboard_its_pedals_and_an_instrument(page):
    assert page.input_value("#midi_in") == "k"
    page.select_option("#midi_out", "o")
    page.evaluate("midi.play([0x90, 48, 90]); midi.play([0xb0, 64, 127]); midi.play([0x80, 48, 0])")
    page.evaluate("midi.play([0x90, 52, 0]); midi.play([0xb0, 67, 127])")
    page.wait_for_selector("body[data-turn=model]")
    page.wait_for_function("midi.sent.some(data => data[0] === 0x90)")
    assert page.evaluate("duet.notes[0].pitch") == 48


def test_by_mouse_at_360_pixels_in_the_dark_and_by_keyboard_alone(browser, port):
    context = browser.new_context(
        viewport={"width": 360, "height": 740}, color_scheme="dark", has_touch=True, bypass_csp=True
    )
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("body[data-turn=player]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator("#keys i:not(.sharp)").nth(3).click(position={"x": 5, "y": 80})
    page.wait_for_function("duet.notes.length === 1 && duet.notes[0].end !== null")
    for _ in range(20):  # every control is reached by Tab
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "temperature":
            break
    else:
        pytest.fail("the settings cannot be reached by keyboard")
    page.evaluate("duet.connection.say('bye')")
    context.close()


def test_everything_is_the_servers_own(browser, port):
    page = browser.new_context().new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("body[data-turn=player]")
    page.click("#hand")
    page.wait_for_selector("body[data-turn=model]")
    page.evaluate("duet.connection.say('bye')")
    page.goto(f"http://127.0.0.1:{port}/docs")
    page.wait_for_selector("h2:has-text('POST /v1/tokenise')")
    assert Path(page.url).name == "docs"
    assert not [text for text in said if "Content Security Policy" in text]
    page.context.close()


def test_the_command_says_ready_and_saves_at_ctrl_c(duet_model, tmp_path):
    save_model(tmp_path / "model", duet_model)
    command = [sys.executable, "-m", "aria_jax.cli.main", "serve", "--port", "0", "--players", "1"]
    program = subprocess.Popen(
        [*command, "--checkpoint", tmp_path / "model", "--save", tmp_path / "saved"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    ready = program.stdout.readline()
    port = int(re.search(r"ready: http://127.0.0.1:(\d+)/", ready)[1])
    with connect(f"ws://127.0.0.1:{port}/duet") as socket:
        for message in (
            {"type": "hello"},
            {"type": "note_on", "t": 0, "pitch": 60, "velocity": 60},
        ):
            socket.send(json.dumps(message))
        time.sleep(0.5)
        program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=60)
    assert program.returncode == 0 and "1 sessions saved" in out, err
    (saved,) = (tmp_path / "saved").glob("*.mid")
    assert read_midi(saved).notes["pitch"].tolist() == [60]
