"""The page in Firefox, spoken to by WebDriver BiDi: played on keys, handed over, heard."""

import itertools
import json
import re
import shutil
import subprocess
import time

import pytest
from websockets.sync.client import connect

from aria_jax.serve.app import Models
from aria_jax.serve.studio import Studio
from tests.aria_jax.serve.test_serve import serving

pytestmark = pytest.mark.slow
FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)
SETTINGS = """
user_pref("media.autoplay.default", 0);
user_pref("media.autoplay.blocking_policy", 0);
user_pref("datareporting.policy.dataSubmissionEnabled", false);
"""


class Firefox:
    """A page of a Firefox without a window."""

    def __init__(self, socket) -> None:
        self.socket, self.numbers = socket, itertools.count(1)
        self.call("session.new", capabilities={})
        self.context = self.call("browsingContext.getTree")["contexts"][0]["context"]

    def call(self, method: str, **params) -> dict:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv(timeout=60))).get("id") != number:
            pass  # an event
        assert answer["type"] == "success", answer
        return answer["result"]

    def open(self, address: str) -> None:
        self.call("browsingContext.navigate", context=self.context, url=address, wait="complete")

    def ask(self, expression: str):
        """The value of an expression, as JSON has it."""
        found = self.call(
            "script.evaluate", expression=f"JSON.stringify({expression})", awaitPromise=True,
            target={"context": self.context},
        )  # fmt: skip
        assert found["type"] == "success", found
        return json.loads(found["result"].get("value", "null"))

    def until(self, condition: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.ask(f"Boolean({condition})"):
            assert time.monotonic() < end, condition
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        steps = [
            step
            for key in keys
            for step in (
                {"type": "keyDown", "value": key},
                {"type": "pause", "duration": 60},
                {"type": "keyUp", "value": key},
            )
        ]
        actions = [{"type": "key", "id": "keys", "actions": steps}]
        self.call("input.performActions", context=self.context, actions=actions)


@pytest.fixture
def firefox(tmp_path):
    if FIREFOX is None:
        pytest.skip("needs Firefox: apt-get install firefox-esr")
    (tmp_path / "user.js").write_text(SETTINGS)
    program = subprocess.Popen(
        [FIREFOX, "--headless", "--no-remote", "--remote-debugging-port=0", "--profile", tmp_path],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for line in program.stderr:
            if found := re.search(r"BiDi listening on (ws://[\w.:]+)", line):
                break
        else:
            pytest.skip("this Firefox cannot be driven: it does not speak WebDriver BiDi")
        with connect(f"{found[1]}/session", max_size=None) as socket:
            yield Firefox(socket)
    finally:
        program.terminate()
        program.wait(timeout=30)


def test_played_handed_over_heard_and_taken_over(firefox, duet_engine):
    models = Models(Studio(duet_engine, "standard", about="a test"), "standard")
    with serving(models) as port:
        firefox.open(f"http://127.0.0.1:{port}/")
        firefox.until("document.body.dataset.turn === 'player'")
        firefox.until("duet.sound.buffers.size === 16")
        firefox.press(*"asdf")
        assert firefox.ask("duet.notes.map(note => note.pitch)") == [60, 62, 64, 65]
        firefox.press(" ")
        firefox.until("document.body.dataset.turn === 'model' && duet.answer.length > 2")
        assert firefox.ask("duet.sound.scheduled.some(one => one.owner === 'model')")
        firefox.press("a")
        firefox.until("document.body.dataset.turn === 'player'")
        firefox.ask("duet.connection.say('bye')")
