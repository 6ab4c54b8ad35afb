"""Clients of the soak: the package's own, and rude ones; each checks every score that it is told."""

import base64
import io
import json
import math
import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from tests.rewards.samples import entry
from tests.serving.http.servers import Answer, Server, at_once
from tests.serving.http.soak_server import fingerprint
from tiltflow.rewards import build_reward_model
from tiltflow.rewards.retries import RemoteRewardError
from tiltflow.serving import wire

EXPECTED = {"good": "ok", "nan": "nonfinite_score", "poison": "scorer_error", "cut": "image_decode_failed"}
PASSING = {"worker_lost", "deadline_exceeded", "overloaded", "loading"}  # what any item may meet while a worker is gone


@dataclass
class Tally:
    """What happened, by name; shared by all threads."""

    counts: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])  # what must never happen
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str, number: int = 1) -> None:
        with self.lock:
            self.counts[name] += number

    def complain(self, text: str) -> None:
        with self.lock:
            self.wrong.append(text)


@dataclass(frozen=True)
class Made:
    """One sample and what must come of it."""

    kind: str  # a key of EXPECTED
    prompt: str
    image: Image.Image

    @property
    def score(self) -> float:
        return fingerprint(self.prompt, np.asarray(self.image))


def make(chance: random.Random, *, kinds: tuple[str, ...] = ("good", "nan", "poison")) -> Made:
    """Return a sample that is most often good."""
    kind = "good" if chance.random() < 0.93 else chance.choice(kinds)
    size = (chance.randint(1, 96), chance.randint(1, 96))
    image = Image.frombytes("RGB", size, chance.randbytes(3 * size[0] * size[1]))
    return Made(kind, f"{kind} {chance.getrandbits(64):x}", image)


# --- the package's own client -----------------------------------------------------------------------------------------


def own_client(server: Server, tally: Tally, chance: random.Random, ended: Callable[[], bool]) -> None:
    """Score batches with a remote reward until the soak ends."""
    options = {"server_url": f"http://127.0.0.1:{server.port}", "required_fields": ["prompt", "image"]}
    reward: Any = build_reward_model(entry("far", "RemotePointwiseRewardModel", options=options, timeout=30))
    while not ended():
        made = [make(chance) for _ in range(chance.randint(1, 8))]
        try:
            output = reward(prompt=[each.prompt for each in made], image=[each.image for each in made])
        except RemoteRewardError as error:
            codes = [code for code in (*PASSING, *EXPECTED.values()) if code in str(error)]
            tally.count("own: failed")
            if not codes:
                tally.complain(f"a request failed: {error}")
            continue
        for place, (each, score) in enumerate(zip(made, output.rewards.tolist(), strict=True)):
            code = str(output.failures[place]).partition(":")[0] if place in output.failures else "ok"
            judge(tally, "own", each, code, None if math.isnan(score) else score)
    reward.close()


def judge(tally: Tally, who: str, made: Made, code: str, score: float | None) -> None:
    """Check what one sample was told."""
    tally.count(f"{who}: {code}")
    if code == "ok" and (made.kind != "good" or score != made.score):
        tally.complain(f"{who}: {made.prompt!r} was told {score}, not {made.score if made.kind == 'good' else 'error'}")
    if code != "ok" and score is not None:
        tally.complain(f"{who}: {made.prompt!r} was told {score} beside {code}")
    if code == "scorer_error" and made.kind in ("good", "nan"):
        tally.count("unlucky")  # it was alone in a call that was told to raise
    elif code not in PASSING and code != EXPECTED[made.kind]:
        tally.complain(f"{who}: {made.prompt!r} was told {code}, not {EXPECTED[made.kind]}")


# --- rude ones --------------------------------------------------------------------------------------------------------


def encoded(made: Made) -> dict[str, str]:
    buffer = io.BytesIO()
    made.image.save(buffer, "PNG")
    data = buffer.getvalue()
    return {"b64": base64.b64encode(data[: len(data) // 2] if made.kind == "cut" else data).decode()}


def body_of(made: list[Made]) -> bytes:
    items = [{"id": uuid.uuid4().hex, "prompt": each.prompt, "image": encoded(each)} for each in made]
    return json.dumps({"items": items}).encode()


def read(tally: Tally, who: str, made: list[Made], answer: Answer) -> None:
    """Check one reply."""
    if "results" not in answer.json:
        code = answer.error["code"]
        tally.count(f"{who}: {code}")
        if code not in PASSING:
            tally.complain(f"{who}: the request was answered {answer.status} {answer.error}")
        return
    for each, result in zip(made, answer.json["results"], strict=True):
        code = "ok" if result["status"] == "ok" else result["error"]["code"]
        judge(tally, who, each, code, result["scores"].get("Fingerprint"))


def keyed() -> dict[str, str]:
    return {"Content-Type": wire.JSON, wire.KEY_HEADER: uuid.uuid4().hex}


def polite(server: Server, tally: Tally, chance: random.Random) -> None:
    """Send a request with a picture that may end too soon."""
    made = [make(chance, kinds=("nan", "poison", "cut")) for _ in range(chance.randint(1, 8))]
    answer = server.ask("POST", wire.SCORE_PATH, body_of(made), headers=keyed())
    read(tally, "raw", made, answer)


def twice(server: Server, tally: Tally, chance: random.Random) -> None:
    """Send one request twice at once, and then another one with its key."""
    made, headers = [make(chance) for _ in range(3)], keyed()
    body = body_of(made)
    answers = at_once(2, lambda _: server.ask("POST", wire.SCORE_PATH, body, headers=headers))
    for answer in answers:
        read(tally, "twice", made, answer)
    if answers[0].status == answers[1].status == 200:
        if answers[0].json["results"] != answers[1].json["results"]:
            tally.complain("twice: one key, two replies")
        other = server.ask("POST", wire.SCORE_PATH, body_of([make(chance)]), headers=headers)
        if other.status != 409:
            tally.complain(f"twice: another body with the key was answered {other.status}")


def slow(server: Server, tally: Tally, chance: random.Random, *, ended: threading.Event) -> None:
    """Send a body in two parts, and sometimes only the first one; or leave before the reply."""
    made = [make(chance) for _ in range(2)]
    body = body_of(made)
    head = f"POST {wire.SCORE_PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: {wire.JSON}\r\nContent-Length: {len(body)}\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + body[: len(body) // 2])
        ended.wait(chance.uniform(0, 0.4))
        how = chance.choice(["half", "gone", "whole"])
        tally.count(f"slow: {how}")
        if how == "half":
            return
        connection.sendall(body[len(body) // 2 :])
        if how == "gone":
            return
        received = b""
        while part := connection.recv(2**16):
            received += part
    status, _, content = received.partition(b"\r\n\r\n")
    read(tally, "slow", made, Answer(int(status.split()[1]), {}, content, 0.0))


def garbage(server: Server, tally: Tally, chance: random.Random) -> None:
    """Send what is no request."""
    kind = chance.choice([wire.JSON, wire.SAFETENSORS, "text/plain"])
    body = chance.randbytes(chance.randint(0, 4096))
    answer = server.ask("POST", wire.SCORE_PATH, body, headers={"Content-Type": kind})
    tally.count(f"garbage: {answer.error['code']}")
    if answer.status not in (400, 415, 422):
        tally.complain(f"garbage: answered {answer.status}")


def rude_client(server: Server, tally: Tally, chance: random.Random, ended: threading.Event) -> None:
    """Do one of these things after the other until the soak ends."""
    while not ended.is_set():
        match chance.choices(["polite", "twice", "slow", "garbage"], [6, 2, 2, 1])[0]:
            case "polite":
                polite(server, tally, chance)
            case "twice":
                twice(server, tally, chance)
            case "slow":
                slow(server, tally, chance, ended=ended)
            case _:
                garbage(server, tally, chance)
        ended.wait(0.02)
