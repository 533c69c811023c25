"""The errors a user can cause, told in a way that says what to do."""


class UserError(Exception):
    """A mistake the user can mend: the message says what, where, and what to do.

    The command line prints the message on one line and exits with status 2; libraries never
    catch it silently.
    """


class InvalidMidi(UserError):
    """Bytes that are not a usable MIDI file.

    Attributes:
        reason: short machine-readable word for `rejected.jsonl`, e.g. "not-midi", "truncated".
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason
