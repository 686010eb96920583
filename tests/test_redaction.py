"""The secret never stands in an answer, in no form and however it is cut; nothing else is changed or held back."""

import base64
import html
import itertools
import json
import os
import re
import string
import threading
import time
import unittest
import urllib.parse

from broker import RedactedStream, Redactor, secret_forms
from tests.support import BrokerTestCase, Puppet, linux_only, make_executable, posix_only, seeded

MODELS = "/v1/models"
REDACTED = b"[redacted]"

# What the secrets here are made of besides letters and digits: all that one of the forms writes in another way.
SPECIAL = "/+=&<>\"'\\%?#:;,@!$*()[]{}|^~`.-_"


def percent_lower(form):
    """`%2F` as `%2f`, all else as it is."""
    head, *rest = form.split("%")
    return "%".join([head] + [part[:2].lower() + part[2:] for part in rest])


def escaped(text, characters, form):
    """Each of these characters in a form such as `\\u%04x`."""
    return "".join(form % ord(character) if character in characters else character for character in text)


def forms(secret):
    """Every form that is to be replaced, by name, as bytes: written out as the encoders of the usual languages do."""
    as_python = json.dumps(secret)[1:-1]
    backslashed = secret.replace("\\", "\\\\")
    found = {
        "itself": secret,
        "JSON as Python writes it": as_python,
        "JSON as PHP writes it": as_python.replace("/", "\\/"),
        "JSON as Go writes it": escaped(as_python, "<>&", "\\u%04x"),
        "JSON as Java's Gson writes it": escaped(as_python, "<>&'=", "\\u%04x"),
        "JSON as .NET writes it": escaped(backslashed, "<>&'+`\"", "\\u%04X"),
        "JSON as .NET writes it, in small letters": escaped(backslashed, "<>&'+`\"", "\\u%04x"),
        "HTML": html.escape(secret),
        "HTML with its quotes": html.escape(secret, quote=False),
        "HTML as PHP writes it": html.escape(secret).replace("&#x27;", "&#039;"),
        "HTML as Go writes it": html.escape(secret).replace("&quot;", "&#34;").replace("&#x27;", "&#39;").replace("+", "&#43;"),
        "HTML in numbers": escaped(secret, "&<>\"'", "&#%d;"),
        "HTML in hex": escaped(secret, "&<>\"'", "&#x%x;"),
        "HTML in hex, plus and equals signs too": escaped(secret, "&<>\"'+=`", "&#x%X;"),
        "percent, every byte": "".join(f"%{byte:02X}" for byte in secret.encode()),
        "percent, as Python's quote": urllib.parse.quote(secret),
        "percent, as Python's quote of one segment": urllib.parse.quote(secret, safe=""),
        "percent, with the tilde, as Java": urllib.parse.quote(secret, safe="*").replace("~", "%7E"),
        "percent, as PHP's rawurlencode of old": urllib.parse.quote(secret, safe="").replace("~", "%7E"),
        "percent, as JavaScript's encodeURIComponent": urllib.parse.quote(secret, safe="!'()*"),
        "percent, as JavaScript's encodeURI": urllib.parse.quote(secret, safe="!'()*;,/?:@&=+$#"),
        "percent, as Go's PathEscape": urllib.parse.quote(secret, safe="$&+:=@"),
        "hex": secret.encode().hex(),
        "hex in capitals": secret.encode().hex().upper(),
    }
    for name in list(found):
        if name.startswith("percent"):
            found[name + ", in small letters"] = percent_lower(found[name])
    return {name: form.encode() for name, form in found.items()}


def base64_forms(secret):
    """(name, the text as the upstream shows it, what has to come out of it)"""
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for before, after in ((b"", b""), (b"u", b""), (b"us", b"!"), (b"use", b"?x"), (b"user:", b""), (b"Bearer ", b"")):
            encoded = encode(before + secret.encode() + after)
            # Bits shared with a neighbour belong to it: those characters stay.
            first = -(-len(before) * 8 // 6)
            last = (len(before) + len(secret)) * 8 // 6
            name = f"{encode.__name__} between {before!r} and {after!r}"
            yield name, encoded, encoded[:first] + REDACTED + encoded[last:]
            if encoded.endswith(b"="):
                bare = encoded.rstrip(b"=")
                yield name + ", no padding", bare, bare[:first] + REDACTED + bare[last:]


class Model:
    """What has to come out after each piece that goes in: the contract in a few lines, without any speed."""

    def __init__(self, secret):
        # The forms here, and those that the broker knows beside them: their beginnings are held back as well.
        self.forms = set(forms(secret).values()) | {form.whole for form in secret_forms(secret.encode())}
        for before in range(3):
            encoded = base64.b64encode(b"\0" * before + secret.encode())
            core = encoded[-(-before * 8 // 6) : (before + len(secret)) * 8 // 6]
            self.forms |= {core, core.translate(bytes.maketrans(b"+/", b"-_"))}
        self.forms = sorted(self.forms, key=len, reverse=True)
        self.held = b""

    def feed(self, piece):
        data, out, at = self.held + piece, b"", 0
        while at < len(data):
            form = next((form for form in self.forms if data.startswith(form, at)), None)
            if form:
                out, at = out + REDACTED, at + len(form)
            elif any(form.startswith(data[at:]) for form in self.forms):
                break
            else:
                out, at = out + data[at : at + 1], at + 1
        self.held = data[at:]
        return out


def random_secret(random, length=None):
    """Begins and ends with a letter: where a form is the beginning of another one is a question of its own."""
    alphabet = string.ascii_letters + string.digits + SPECIAL * 2
    while True:
        inner = "".join(random.choice(alphabet) for _ in range((length or random.choice((16, 17, 18, 31, 50))) - 2))
        secret = random.choice(string.ascii_letters) + inner + random.choice(string.ascii_letters)
        if not re.match("[A-Za-z_][A-Za-z0-9_]*=", secret):  # that would be NAME=value, and no key
            return secret


class Stream:
    """A streamed answer, piece by piece: each has to come out as the model says before the next goes in."""

    def __init__(self, case, upstream, served, secret):
        self.case, self.secret, self.model = case, secret, Model(secret)
        self.puppet = Puppet(upstream)
        self.caller = served.connect()
        self.caller.send(served.head("GET", MODELS))
        self.puppet.wait()
        self.puppet.start_stream("text/plain")
        self.caller.read_head()
        self.fed = []

    def feed(self, piece):
        self.fed.append(piece)
        self.puppet.chunk(piece)
        self.expect(self.model.feed(piece))

    def expect(self, expected):
        got = b""
        while len(got) < len(expected):
            got += self.caller.read_chunk()
        self.case.assertEqual(got, expected, self.fed[-3:])

    def end(self):
        self.puppet.end()
        self.puppet.done()
        if self.model.held:
            self.expect(self.model.held)
        self.case.assertEqual(self.caller.read_chunk(), b"")
        self.caller.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.end()
        else:
            self.puppet.close()
            self.caller.close()


class RedactionTestCase(BrokerTestCase):
    """One broker and one upstream for all tests of a class."""

    secret = random_secret(seeded("the secret of a class"))

    @classmethod
    def setUpClass(cls):
        cls.upstream = cls.class_stub()
        cls.served = cls.class_broker(cls.upstream, secret=cls.secret)

    def setUp(self):
        self.upstream.forget()

    def comes_out(self, body, headers=(), status=200, reason="OK"):
        """The answer to a caller when the upstream sends this."""
        self.upstream.script(lambda conn, request: conn.respond(status, headers, body, reason))
        answer = self.served.request("GET", MODELS)
        self.assertEqual(answer.status, status)
        return answer

    def stream(self):
        return Stream(self, self.upstream, self.served, self.secret)


class EveryForm(RedactionTestCase):
    def test_is_replaced_in_a_body_and_nothing_else_is(self):
        for name, form in forms(self.secret).items():
            with self.subTest(name):
                for before, after in ((b"", b""), (b"before ", b" after"), (b'{"key": "Bearer ', b'"}'), (form[-3:], form[:3])):
                    self.assertEqual(self.comes_out(before + form + after).body, before + REDACTED + after)
                self.assertEqual(self.comes_out(form * 3).body, REDACTED * 3)

    def test_of_base64_is_replaced_but_for_what_a_neighbour_shares(self):
        for name, shown, expected in base64_forms(self.secret):
            with self.subTest(name):
                self.assertEqual(self.comes_out(b"<" + shown + b">").body, b"<" + expected + b">")

    def test_is_replaced_in_headers(self):
        shown = {**forms(self.secret), **{name: text for name, text, _ in base64_forms(self.secret)}}
        results = {**dict.fromkeys(forms(self.secret), REDACTED), **{name: out for name, _, out in base64_forms(self.secret)}}
        for name, form in shown.items():
            with self.subTest(name):
                headers = [("X-Debug", f"<{form.decode()}>"), ("X-Other", "as it is"), ("Content-Type", form.decode())]
                answer = self.comes_out(b"body", headers)
                self.assertEqual(answer.header("X-Debug"), f"<{results[name].decode()}>")
                self.assertEqual(answer.header("Content-Type"), results[name].decode())
                self.assertEqual((answer.header("X-Other"), answer.body), ("as it is", b"body"))

    def test_is_replaced_in_answers_without_a_body(self):
        for status in (204, 304):
            with self.subTest(status):
                self.assertEqual(self.comes_out(b"", [("ETag", self.secret)], status).header("ETag"), REDACTED.decode())
        self.upstream.script(lambda conn, request: conn.respond(200, [("X-Debug", self.secret)], b""))
        self.assertEqual(self.served.request("HEAD", MODELS).header("X-Debug"), REDACTED.decode())

    def test_is_replaced_in_errors(self):
        for status in (400, 403, 404, 429, 500, 503):
            with self.subTest(status):
                body = json.dumps({"error": {"message": f"the key {self.secret} may not do this"}})
                headers = [("Content-Type", "application/json"), ("X-Debug", "Bearer " + self.secret)]
                answer = self.comes_out(body, headers, status)
                self.assertEqual(answer.json(), {"error": {"message": "the key [redacted] may not do this"}})
                self.assertEqual(answer.header("X-Debug"), "Bearer [redacted]")

    def test_is_replaced_in_the_reason(self):
        self.assertNotIn(self.secret, self.comes_out(b"", reason=f"no {self.secret} here").reason)

    def test_is_replaced_for_a_caller_of_http_1_0(self):
        def answer(conn, request):
            conn.start_stream()
            conn.chunk(b"the key " + self.secret[:9].encode())
            conn.chunk(self.secret[9:].encode() + b" itself")
            conn.end()

        self.upstream.script(answer)
        data = self.served.raw(self.served.head("GET", MODELS, version="HTTP/1.0"))
        self.assertTrue(data.endswith(b"\r\n\r\nthe key [redacted] itself"), data)


class WhatOnlyLooksLikeIt(RedactionTestCase):
    def test_passes_unchanged(self):
        secret = self.secret
        texts = {
            "all but the last character": secret[:-1],
            "all but the first character": secret[1:],
            "one character changed": secret[:7] + ("y" if secret[7] == "x" else "x") + secret[8:],
            "other letters": secret.swapcase(),
            "backwards": secret[::-1],
            "a blank in the middle": secret[:8] + " " + secret[8:],
            "half of its hex": secret.encode().hex()[: len(secret)],
            "hex in mixed letters": "4A4b" * 10,
            "all but the end of its base64": base64.b64encode(secret.encode()).decode()[:-8],
            "the word itself": "[redacted]",
            "nothing": "",
        }
        for case, text in texts.items():
            for before, after in (("", ""), ("<", ">"), (secret[:5], "!")):
                with self.subTest(case, before=before):
                    body = (before + text + after).encode()
                    self.assertEqual(self.comes_out(body).body, body)
                    value = f"x{body.decode()}x"
                    self.assertEqual(self.comes_out(b"", [("X-Debug", value)]).header("X-Debug"), value)

    def test_passes_unchanged_when_it_is_no_text_at_all(self):
        random = seeded("bytes")
        for size in (1, 255, 4096, 100_000, 1_000_000):
            body = bytes(random.getrandbits(8) for _ in range(min(size, 5000))) * (size // 5000 + 1)
            self.assertTrue(self.comes_out(body[:size]).body == body[:size], size)


class Streams(RedactionTestCase):
    """Two pieces, split at every offset of every form: the second goes in when the first has come out."""

    def test_are_searched_across_every_split(self):
        with self.stream() as stream:
            for form in forms(self.secret).values():
                for at in range(1, len(form)):
                    stream.feed(b"<" + form[:at])
                    stream.feed(form[at:] + b">")

    def test_are_searched_across_every_split_of_base64(self):
        with self.stream() as stream:
            for _, shown, _ in base64_forms(self.secret):
                for at in range(1, len(shown)):
                    stream.feed(b"<" + shown[:at])
                    stream.feed(shown[at:] + b">")

    def test_are_searched_when_they_come_byte_by_byte(self):
        with self.stream() as stream:
            for form in forms(self.secret).values():
                for byte in b"<" + form + b">" + form[:-1] + b"|":
                    stream.feed(bytes([byte]))

    def test_hold_back_nothing_that_cannot_be_its_beginning(self):
        # Whatever a piece ends in: what can't become the secret any more is out before the next piece is in.
        with self.stream() as stream:
            for ending in string.printable.encode():
                stream.feed(b"data: {} " + bytes([ending]))
            for form in forms(self.secret).values():
                for at in range(1, len(form)):
                    wrong = b"!" if form[at : at + 1] != b"!" else b"?"
                    stream.feed(b"data: " + form[:at] + wrong)

    def test_let_a_beginning_out_when_it_is_the_end(self):
        for form in forms(self.secret).values():
            for at in (1, len(form) // 2, len(form) - 1):
                with self.stream() as stream:
                    stream.feed(b"data: " + form[:at])


class SecretsOfEveryKind(BrokerTestCase):
    """Generated ones, each with a broker of its own, in streams of generated pieces."""

    def secrets(self):
        random = seeded("secrets")
        yield "of the shortest kind", random_secret(random, 16)
        yield "of special characters", random_secret(random)
        yield "of one character", "a" * 16
        yield "of which a beginning comes again and again", "ab" * 8 + "c"
        yield "of which the end is its beginning", "Zx-9Zx-9" + "q" * 10 + "Zx-9Zx-9"
        yield "of the longest kind", random_secret(random, 4096)

    def pieces(self, random, secret):
        """Parts of it and of its forms, whole and broken, among other things."""
        known = list(forms(secret).values()) + [shown for _, shown, _ in base64_forms(secret)]
        while True:
            form = random.choice(known)
            at, end = sorted(random.choices(range(len(form) + 1), k=2))
            cut = [form, form[:at] + form[at:], form[:end], form[at:end], form[:at] + b"#", b"#" + form[at:], b" plain "]
            yield random.choice(cut) or b"-"

    def test_are_found_and_nothing_else_is_touched_or_held_back(self):
        stub = self.stub()
        for kind, secret in self.secrets():
            with self.subTest(kind):
                random = seeded(kind)
                broker = self.broker(stub, secret=secret)
                pieces = self.pieces(random, secret)
                with Stream(self, stub, broker, secret) as stream:
                    for _ in range(4 if len(secret) > 1000 else 100):
                        stream.feed(next(pieces))
                for form in list(forms(secret).values())[:: 6 if len(secret) > 1000 else 1]:
                    stub.script(lambda conn, request, form=form: conn.respond(body=b"<" + form + b">"))
                    self.assertEqual(broker.request("GET", MODELS).body, b"<" + REDACTED + b">")


class TheSearch(unittest.TestCase):
    """The pure part by itself: more inputs than a conversation each would allow."""

    def test_finds_every_form_of_generated_secrets_and_nothing_else(self):
        random = seeded("the search")
        for number in range(60):
            secret = random_secret(random)
            redactor, shown = Redactor([secret]), list(forms(secret).items())
            shown += [(name, text) for name, text, _ in base64_forms(secret)]
            for name, form in shown:
                with self.subTest(number, form=name, secret=secret):
                    self.assertTrue(redactor.has(b"x" + form + b"y"))
                    self.assertIn(REDACTED, redactor.clean(form))
            for _ in range(20):
                text = "".join(random.choices(secret + string.ascii_letters, k=200)).encode()
                if secret.encode() not in text:
                    self.assertFalse(redactor.has(text))
                    self.assertEqual(redactor.clean(text), text)

    def test_gives_out_what_the_model_says_however_the_pieces_are_cut(self):
        random = seeded("pieces")
        for number in range(25):
            secret = random_secret(random)
            model, stream = Model(secret), RedactedStream(Redactor([secret]))
            known = list(forms(secret).values()) + [shown for _, shown, _ in base64_forms(secret)]
            text = b"".join(form[: random.randint(0, len(form) * 2)] for form in random.choices(known, k=12))
            while text:
                size = random.choice((1, 2, 7, 30, 200))
                piece, text = text[:size], text[size:]
                with self.subTest(number, secret=secret, piece=piece):
                    self.assertEqual(stream.feed(piece, False), model.feed(piece))
            self.assertEqual(stream.feed(b"", True), model.held)

    def test_finds_a_form_that_is_the_beginning_of_another(self):
        # `...&` ends where `...&amp;` goes on: what is left over then tells nothing.
        for ending in "&<\"'\\/%+=~":
            secret = "sk-0123456789abcdef" + ending
            redactor = Redactor([secret])
            for name, form in forms(secret).items():
                with self.subTest(ending, form=name):
                    body = redactor.clean(b"<" + form + b">")
                    self.assertTrue(body.startswith(b"<" + REDACTED), body)
                    self.assertLessEqual(len(body), len(b"<" + REDACTED + b"&amp;>"))

    def test_is_the_same_for_every_secret_with_the_same_six_characters(self):
        # An agent posts megabytes of one letter and times the answer: the search skips by what it looks for.
        random = seeded("six characters")
        for length in (16, 17, 31, 50, 4096):
            first = (length - 6) // 2
            secrets = [random_secret(random, length) for _ in range(6 if length < 100 else 2)]
            inner = secrets[0][first : first + 6]
            windows = [set(Redactor([one[:first] + inner + one[first + 6 :]]).windows) for one in secrets]
            self.assertTrue(windows[0])
            for other in windows[1:]:
                self.assertEqual(other, windows[0], length)
            self.assertLess(max(map(len, windows[0])), 7)

    def test_of_many_secrets_is_the_same_in_little_and_in_much_text(self):
        random = seeded("many secrets")
        secrets = [random_secret(random) for _ in range(8)]
        redactor = Redactor(secrets)
        for secret in secrets:
            for form in random.choices(list(forms(secret).values()), k=5):
                for filler in (b"", b"." * 50_000):
                    self.assertEqual(redactor.clean(filler + b"<" + form + b">"), filler + b"<" + REDACTED + b">")


class ARotatedSecret(BrokerTestCase):
    def rotating(self, stub, **more):
        """A broker whose secret is another one for each request; and a function that makes the next one."""
        folder = self.folder()
        script = make_executable(folder, "get-secret", "cat secret")
        source = {"kind": "command", "argv": [script], "cache_seconds": 0}
        count = itertools.count()

        def rotate(secret=None):
            secret = secret or random_secret(seeded(f"rotation {next(count)}"))
            with open(os.path.join(folder, "secret"), "w", encoding="ascii") as file:
                file.write(secret)
            return secret

        rotate()
        broker = self.broker(stub, config={"secret_source": source}, folder=folder, **more)
        return broker, lambda secret=None: secret and rotate(secret) or (new := rotate(), broker.also_secret(new))[0]

    @posix_only
    def test_is_hidden_in_the_answer_to_its_own_request_however_many_came_after_it(self):
        release = threading.Event()

        def hold(conn, request):
            conn.hold(release)
            conn.respond_json({"bad key": request.header("Authorization")}, 400)

        stub = self.stub(hold)
        broker, rotate = self.rotating(stub)
        rotate()
        with broker.connect() as caller:
            caller.send(broker.head("GET", MODELS))
            stub.wait_for_requests(1)
            stub.script(lambda conn, request: conn.respond_json({}))
            for _ in range(20):
                rotate()
                self.assertEqual(broker.request("GET", MODELS).status, 200)
            release.set()
            self.assertEqual(caller.read_answer().json(), {"bad key": "Bearer [redacted]"})

    @posix_only
    def test_that_is_rotated_in_during_a_stream_is_hidden_in_it_too(self):
        rotated = threading.Event()
        shown = []

        def stream(conn, request):
            conn.start_stream("text/plain")
            conn.chunk(b"<")
            conn.hold(rotated)
            conn.chunk(shown[0].encode())
            conn.chunk(b">")
            conn.end()

        stub = self.stub(stream)
        broker, rotate = self.rotating(stub)
        rotate()
        with broker.connect() as caller:
            caller.send(broker.head("GET", MODELS))
            stub.wait_for_requests(1)
            caller.read_until(b"<")
            stub.script(lambda conn, request: conn.respond_json({}))
            shown.append(rotate())
            self.assertEqual(broker.request("GET", MODELS).status, 200)
            rotated.set()
            self.assertIn(b"[redacted]", caller.read_until(b">"))

    @posix_only
    def test_does_not_push_the_token_out_of_what_the_log_hides(self):
        stub = self.stub()
        broker, rotate = self.rotating(stub)
        broker.check_token_in_answers = False  # whoever shows it in a path may read it there
        for _ in range(40):
            rotate()
            self.assertEqual(broker.request("GET", MODELS).status, 200)
        self.assertEqual(broker.request("GET", f"/v1/{broker.token}").status, 403)
        self.assertEqual(broker.wait_event(event="denied")["path"], "/v1/[redacted]")

    @posix_only
    def test_is_refused_in_a_request_like_the_one_of_today(self):
        broker, rotate = self.rotating(self.stub())
        old = rotate("sk-the-key-of-yesterday-0123")
        broker.also_secret(old)
        for _ in range(2):
            self.assertEqual(broker.request("GET", MODELS).status, 200)
            rotate()
        self.assert_refused(broker.post_json("/v1/chat/completions", {"a": f"my {old}"}), 403, "secret_in_request")

    @posix_only
    def test_that_was_an_ordinary_word_of_the_log_is_hidden_there_from_then_on(self):
        broker, rotate = self.rotating(self.stub())
        word = "sk-an-ordinary-word-0123456789"
        paths = []
        for _ in range(2):
            self.assertEqual(broker.request("GET", f"/v1/{word}").status, 403)
            paths.append(broker.wait_event(event="denied", count=len(paths) + 1)["path"])
            rotate(word)
            self.assertEqual(broker.request("GET", MODELS).status, 200)
        self.assertEqual(paths, [f"/v1/{word}", "/v1/[redacted]"])

    @linux_only
    def test_of_four_thousand_characters_takes_no_more_time_and_memory_the_twentieth_time(self):
        broker, rotate = self.rotating(self.stub())
        waits, memory = [], []
        for _ in range(20):
            rotate(random_secret(seeded(f"long {len(waits)}"), 4096))
            began = time.monotonic()
            self.assertEqual(broker.request("GET", MODELS).status, 200)
            waits.append(time.monotonic() - began)
            memory.append(broker.rss_anon_kb())
        self.assertLess(min(waits[-5:]), 3 * min(waits[:5]) + 0.1)
        self.assertLess(memory[-1] - memory[8], 8 << 10)

    @posix_only
    def test_is_hidden_like_the_one_of_today(self):
        stub, folder = self.stub(), self.folder()
        script = make_executable(folder, "get-secret", "cat secret")
        path = os.path.join(folder, "secret")
        used = [random_secret(seeded(f"rotation {number}")) for number in range(3)]

        def write(secret):
            with open(path, "w", encoding="ascii") as file:
                file.write(secret)

        write(used[0])
        source = {"kind": "command", "argv": [script], "cache_seconds": 0}
        broker = self.broker(stub, config={"secret_source": source}, folder=folder)
        for secret in used:
            broker.also_secret(secret)
            write(secret)
            self.assertEqual(broker.request("GET", MODELS).status, 200)
            self.assertEqual(stub.requests[-1].header("Authorization"), "Bearer " + secret)
        for name in forms(used[0]):
            with self.subTest(name):
                shown = b"|".join(forms(secret)[name] for secret in used)

                def answer(conn, request, shown=shown):
                    conn.start_stream("text/plain")
                    for at in range(0, len(shown), 7):
                        conn.chunk(shown[at : at + 7])
                    conn.end()

                stub.script(answer)
                self.assertEqual(broker.request("GET", MODELS).body, b"|".join([REDACTED] * 3))
