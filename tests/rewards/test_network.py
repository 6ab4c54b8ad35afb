"""The deadline of an exchange, kept against real sockets whose other side does whatever prevents its end."""

import contextlib
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rewards.reward_server import Script, listen, server_of, serving, url_of
from tests.rewards.samples import entry
from tests.sockets import receive
from tiltflow.rewards import build_reward_model
from tiltflow.rewards import remote as remote_module
from tiltflow.rewards import transport as transport_module
from tiltflow.rewards.payload import Parcel
from tiltflow.rewards.retries import Patience, RemoteTimeoutError, RewardClient
from tiltflow.rewards.transport import AttemptError, ServerSettings, Transport
from tiltflow.serving import wire

TIMEOUT = 0.7  # seconds that an exchange has
AGES = 20.0  # seconds that a hostile server would go on for
Behaviour = Callable[[socket.socket], None]


class Hostile:
    """A server that treats every connection in its own way, and notes when the other side has gone."""

    def __init__(self, behaviour: Behaviour):
        self._behaviour = behaviour
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # little is taken that nobody reads
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.url = url_of(self.listener)
        self.left: list[float] = []  # when each connection ended
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self._behaviour(connection)
        self.left.append(time.monotonic())

    def ended(self) -> int:
        """Wait until every connection has been closed by the other side, and return how many there were."""
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()
        return len(self.left)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._acceptor.join(5)
        assert not self._acceptor.is_alive()


@contextlib.contextmanager
def hostile(behaviour: Behaviour) -> Iterator[Hostile]:
    server = Hostile(behaviour)
    try:
        yield server
    finally:
        server.close()


def trickle(connection: socket.socket, text: bytes) -> None:
    """Send one byte after the other, until the other side has had enough."""
    end = time.monotonic() + AGES
    while time.monotonic() < end:
        for byte in text:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)


def read_head(connection: socket.socket) -> None:
    text = b""
    while b"\r\n\r\n" not in text:
        text += receive(connection)


def trickle_headers(connection: socket.socket) -> None:
    read_head(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    trickle(connection, b"X-More: and more\r\n")


def trickle_body(connection: socket.socket) -> None:
    read_head(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    trickle(connection, b" ")


def trickle_chunks(connection: socket.socket) -> None:
    read_head(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    trickle(connection, b"1\r\n \r\n")


def promise_for_ever(connection: socket.socket) -> None:
    read_head(connection)
    trickle(connection, b"HTTP/1.1 102 Processing\r\n\r\n")


def read_nothing(connection: socket.socket) -> None:
    time.sleep(2 * TIMEOUT)
    while connection.recv(2**20):
        pass  # what had been sent before the other side closed


def read_slowly(connection: socket.socket) -> None:
    """Take some now and then: each single write goes on."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)  # enough at a time for the next write to begin
    while connection.recv(65_536):
        time.sleep(0.005)


def shake_no_hands(connection: socket.socket) -> None:
    trickle(connection, b"\x16\x03\x03\x40\x00" + b"\x02")


def parcel(size: int = 16) -> Parcel:
    return Parcel(
        key="k",
        body=b"x" * size,
        content_type=wire.JSON,
        places=(0,),
        ids=("k-0",),
        model="m",
        revision="",
        whole=False,
    )


HOSTILE: list[tuple[Behaviour, str, int, str]] = [
    (trickle_headers, "http", 16, "did not answer within 0.7 s: ReadTimeout: timed out"),
    (trickle_body, "http", 16, "did not (answer within 0.7 s: ReadTimeout|finish its answer in time)"),
    (trickle_chunks, "http", 16, "did not (answer within 0.7 s: ReadTimeout|finish its answer in time)"),
    (promise_for_ever, "http", 16, "did not answer within 0.7 s: ReadTimeout: timed out"),
    (read_nothing, "http", 2**25, "did not take the request within 0.7 s: WriteTimeout: timed out"),
    (read_slowly, "http", 2**26, "did not take the request within 0.7 s: WriteTimeout: timed out"),
    (shake_no_hands, "https", 16, "cannot be reached: ConnectTimeout: "),
]


@pytest.mark.parametrize(("behaviour", "scheme", "size", "message"), HOSTILE)
def test_no_server_can_make_an_exchange_last_longer_than_its_time(
    behaviour: Behaviour, scheme: str, size: int, message: str
) -> None:
    sent = parcel(size)
    with hostile(behaviour) as server:
        url = server.url.replace("http", scheme)
        threads = set(threading.enumerate())
        transport = Transport(ServerSettings("far", (url,)))
        transport.check()
        began = time.monotonic()
        with pytest.raises(AttemptError, match=message):
            transport.score(url, sent, timeout=TIMEOUT, time_left=TIMEOUT)
        took = time.monotonic() - began
        assert 0.9 * TIMEOUT < took < 4  # a loaded machine may take its time to wake up
        assert server.ended() == 1  # closed by this side, before the transport is
        assert set(threading.enumerate()) <= threads
        transport.close()


@pytest.mark.parametrize("behaviour", [trickle_headers, trickle_body, read_slowly])
def test_the_tries_of_a_request_share_its_time(behaviour: Behaviour) -> None:
    with hostile(behaviour) as server:
        client = RewardClient(ServerSettings("far", (server.url,)), Patience(TIMEOUT, 3))
        began = time.monotonic()
        with pytest.raises(RemoteTimeoutError, match=r"no answer can be had within 0\.7 s; last: http://127"):
            client.send(parcel(2**26 if behaviour is read_slowly else 16), client.begin())
        assert time.monotonic() - began < 4
        client.close()
        assert server.ended() == 1


def test_a_server_that_trickles_leaves_time_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "ANSWER_SECONDS", 1.0)
    with serving(Script("length")) as good, hostile(trickle_body) as server:
        options = {"server_url": [server.url, good], "required_fields": ["prompt"]}
        reward: Any = build_reward_model(entry("far", "RemotePointwiseRewardModel", options=options, timeout=4))
        began = time.monotonic()
        assert reward(prompt=["abc"]).rewards.tolist() == [3.0]
        assert 1.9 < time.monotonic() - began < 4  # the first one asked had half of the time
        reward.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second address of this machine")
def test_an_address_that_does_not_answer_leaves_time_for_the_next_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Script("length")) as url, socket.socket() as full:
        port = int(url.rpartition(":")[2])
        full.bind(("127.0.0.2", port))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]  # fill its queue: a further one gets no answer
        for each in waiting:
            each.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                each.connect(("127.0.0.2", port))
        look_up = socket.getaddrinfo

        def both(host: str, *arguments: Any, **more: Any) -> Any:
            if host != "far.test":
                return look_up(host, *arguments, **more)
            return [*look_up("127.0.0.2", *arguments, **more), *look_up("127.0.0.1", *arguments, **more)]

        monkeypatch.setattr(socket, "getaddrinfo", both)
        monkeypatch.setattr(transport_module, "CONNECT_SECONDS", 3.0)  # half of it for the first
        transport = Transport(ServerSettings("far", (f"http://far.test:{port}",)))
        began = time.monotonic()
        (info,) = transport.models(f"http://far.test:{port}", timeout=30)
        assert 1.4 < time.monotonic() - began < 8
        assert info.name == "length"
        with pytest.raises(AttemptError, match="cannot be reached: ConnectTimeout"):
            transport.models(f"http://127.0.0.2:{port}", timeout=0.3)
        transport.close()
        for each in waiting:
            each.close()


def test_a_name_that_nobody_knows_is_told() -> None:
    transport = Transport(ServerSettings("far", ("http://nobody.invalid",)))
    with pytest.raises(
        AttemptError, match=r"http://nobody.invalid cannot be reached: ConnectError: .*[Nn]ame"
    ) as raised:
        transport.models("http://nobody.invalid", timeout=20)
    assert (raised.value.verdict, raised.value.counts) == ("down", False)


# --- proxies ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_the_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    script = Script("length")
    with serving(script) as url:
        monkeypatch.setenv("HTTP_PROXY", url.replace("http://", scheme))
        monkeypatch.setenv("http_proxy", url.replace("http://", scheme))
        transport = Transport(ServerSettings("far", ("http://far.invalid:7",)))
        assert [info.name for info in transport.models("http://far.invalid:7", timeout=5)] == ["length"]
        transport.close()
        for exempt in ("far.invalid", "a.test, .invalid", "far.invalid:7", "*"):
            monkeypatch.setenv("no_proxy", exempt)
            transport = Transport(ServerSettings("far", ("http://far.invalid:7",)))
            with pytest.raises(AttemptError, match=r"http://far.invalid:7 cannot be reached: ConnectError"):
                transport.models("http://far.invalid:7", timeout=20)
            transport.close()


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        (
            "gopher://me:s3cret@proxy",
            "UnsupportedProtocol: the environment names a proxy that is none, of scheme 'gopher'",
        ),
        (
            "socks5://me:s3cret@proxy",
            "UnsupportedProtocol: the environment names a SOCKS proxy, which needs the package",
        ),
    ],
)
def test_a_proxy_that_cannot_be_used_is_told(monkeypatch: pytest.MonkeyPatch, proxy: str, message: str) -> None:
    monkeypatch.setenv("all_proxy", proxy)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    transport = Transport(ServerSettings("far", ("http://far.test",)))
    with pytest.raises(AttemptError, match=f"http://far.test cannot be asked: {message}") as raised:
        transport.models("http://far.test", timeout=5)
    assert "s3cret" not in str(raised.value)
    assert raised.value.retryable is False


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with a key of this machine's and its certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    subprocess.run([*command, "-keyout", str(made), "-out", str(folder / "crt.pem")], check=True, capture_output=True)
    made.write_text(made.read_text() + (folder / "crt.pem").read_text())
    return made


@contextlib.contextmanager
def serving_tls(script: Script, certificate: Path) -> Iterator[str]:
    server = server_of(script)
    server.config.ssl_certfile = server.config.ssl_keyfile = str(certificate)
    listener = listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield url_of(listener).replace("http://127.0.0.1", "https://localhost")
    finally:
        server.force_exit = server.should_exit = True
        thread.join(10)
        listener.close()


def server_side(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def tunnel(connection: socket.socket) -> None:
    """Be a proxy: connect to where the first lines say, and pass on what comes from either side."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += receive(connection, 1)
    host, _, port = head.split()[1].decode().partition(":")
    with socket.create_connection((host, int(port))) as further:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

        def back() -> None:
            with contextlib.suppress(OSError):
                while data := further.recv(65_536):
                    connection.sendall(data)

        thread = threading.Thread(target=back, daemon=True)
        thread.start()
        while data := connection.recv(65_536):
            further.sendall(data)
        further.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def ask_at_length(url: str, script: Script) -> None:
    """Ask with a body of many TLS records, and have a server hang."""
    options = {"server_url": url, "required_fields": ["prompt"]}
    reward: Any = build_reward_model(entry("far", "RemotePointwiseRewardModel", options=options, timeout=30))
    assert reward(prompt=["a" * 1_000_000]).rewards.tolist() == [1_000_000.0]
    script.always = f"hang:{AGES}"
    began = time.monotonic()
    with pytest.raises(AttemptError, match=r"did not answer within 0\.5 s: ReadTimeout"):
        reward._client.transport.score(url, reward._pack({"prompt": ["a"]}).parcels[0], timeout=0.5, time_left=0.5)
    assert time.monotonic() - began < 4
    reward.close()


def test_a_server_behind_tls_is_asked_and_held_to_its_time(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    script = Script("length")
    with serving_tls(script, certificate) as url:
        ask_at_length(url, script)


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_behind_tls_and_a_proxy_is_asked_and_held_to_its_time(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = server_side(certificate)

    def secured(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True, suppress_ragged_eofs=True) as secure:
            tunnel(secure)

    script = Script("length")
    with serving_tls(script, certificate) as url, hostile(tunnel if scheme == "http" else secured) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url.replace("http://127.0.0.1", f"{scheme}://localhost"))
        ask_at_length(url, script)
        assert proxy.ended() >= 1


@pytest.mark.parametrize("behaviour", [read_slowly, trickle_headers])
def test_the_time_of_an_exchange_holds_inside_tls_too(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = server_side(certificate)

    def secured(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            behaviour(secure)

    with hostile(secured) as server:
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        transport = Transport(ServerSettings("far", (url,)))
        transport.check()
        sent = parcel(2**26 if behaviour is read_slowly else 16)
        began = time.monotonic()
        with pytest.raises(AttemptError, match=r"within 0\.7 s: (Read|Write)Timeout"):
            transport.score(url, sent, timeout=TIMEOUT, time_left=TIMEOUT)
        assert time.monotonic() - began < 4
        transport.close()
        assert server.ended() == 1
