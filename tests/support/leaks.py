"""Canaries, and the search for them.

Each broker of the tests gets a secret and a token that stand nowhere else in the world. What it lets out
(answers, stdout, stderr, the event log) is searched for them as it ends, so every test is a leak test.
"""

import base64
import secrets
import string

# As much of the answers is kept for the search.
REMEMBERED_BYTES = 64 << 20


def canary():
    """A fresh secret, unlike anything that could stand in an answer by chance."""
    alphabet = string.ascii_letters + string.digits + "_-"
    return "sk-canary-" + "".join(secrets.choice(alphabet) for _ in range(40))


def fresh_token():
    """A fresh caller token."""
    return "token-canary-" + secrets.token_urlsafe(24)


def forms_of(secret):
    """Every form (bytes) in which the secret must not be seen: as it is, base64 at the three
    alignments (the characters it shares with a neighbour left out), hex, percent-encoded."""
    raw = secret.encode()
    forms = {raw, raw.hex().encode(), raw.hex().upper().encode()}
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + raw)
        core = encoded[-(-shift * 8 // 6) : (shift + len(raw)) * 8 // 6]
        forms |= {core, core.replace(b"+", b"-").replace(b"/", b"_")}
    every_byte = "".join(f"%{byte:02X}" for byte in raw)
    forms |= {every_byte.encode(), every_byte.lower().encode()}
    return forms


class Canaries:
    """The secrets and tokens of one broker. What is too short to be either is none: it stands everywhere."""

    def __init__(self, secret, token):
        self.secrets = [value for value in (secret,) if self.is_one(value)]
        self.tokens = [value for value in (token,) if self.is_one(value)]

    @staticmethod
    def is_one(value):
        return isinstance(value, str) and len(value) >= 16

    def found_in(self, name, data, tokens=True):
        """A line for each form of a canary that stands in `data` (bytes), with what is around it."""
        kinds = [("secret", value) for value in self.secrets]
        kinds += [("token", value) for value in self.tokens if tokens and value not in self.secrets]
        found = []
        for what, value in kinds:
            for form in forms_of(value):
                at = data.find(form)
                if at >= 0:
                    around = data[max(0, at - 200) : at + len(form) + 200]
                    found.append(f"the {what}, as {form!r}, in {name}: {around!r}")
        return found

    def check(self, places, tokens=True):
        """An AssertionError when one of them stands in one of the places: {name: bytes}."""
        found = [line for name, data in places.items() for line in self.found_in(name, data, tokens)]
        if found:
            raise AssertionError("leaked: " + "; ".join(found))


class Seen:
    """All that callers got to see of a broker, up to a bound."""

    def __init__(self):
        self._pieces = []
        self._count = 0

    def add(self, data):
        if self._count < REMEMBERED_BYTES:
            self._pieces.append(data)
            self._count += len(data)

    def watch(self, growing):
        """What this bytearray will hold in the end belongs to it."""
        self._pieces.append(growing)

    def everything(self):
        return b"\n".join(self._pieces)
