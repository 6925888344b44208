"""Downloads against a server on this machine: whole, cut off, resumed, refused, silent."""

import hashlib
import http.server
import os
import re
import threading

import pytest
import requests
from helpers import failing, refusal

from jaxnorm.data import download

CONTENT = bytes(range(256)) * 20_000
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the server's `mode` says how it misbehaves."""

    def do_GET(self):
        server, start = self.server, 0
        server.asked.append(self.headers.get("Range"))
        if server.mode == "silent":
            server.given_up.wait(60)
            return
        if server.mode == "missing" or "missing" in self.path:
            self.send_error(404, "Not Found")
            return
        asked = self.headers.get("Range")
        if asked and server.mode != "whole again":
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(CONTENT):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            self.send_response(200)
        length = "abc" if server.mode == "no length" else str(len(CONTENT) - start)
        self.send_header("Content-Length", length)
        self.end_headers()
        stop = len(CONTENT) // 2 if server.mode == "cut" else len(CONTENT)
        self.wfile.write(CONTENT[start:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.mode, server.asked, server.given_up = "well", [], threading.Event()
        server.address = f"http://127.0.0.1:{server.server_port}/some%20dir/a.tar.gz"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(address, directory, heard=lambda *at: None):
    return download.fetch(address, directory, heard)


def test_a_download_is_whole_shows_progress_and_is_not_made_twice(scratch, server):
    seen = []
    path = fetch(server.address, scratch / "d", lambda *at: seen.append(at))
    assert path.read_bytes() == CONTENT
    assert path.name == "a.tar.gz"
    assert seen[-1] == ("downloading from 127.0.0.1", len(CONTENT), len(CONTENT))
    assert len(seen) > 3
    fetch(server.address, scratch / "d")
    assert len(server.asked) == 1
    files = {file.name for file in (scratch / "d").rglob("*") if file.is_file()}
    assert files - {".lock"} == {"a.tar.gz"}
    assert fetch(server.address.replace("a.tar.gz", "other/a.tar.gz"), scratch / "d") != path
    assert len(server.asked) == 2


@pytest.mark.parametrize("then", ["well", "whole again"])
def test_a_download_that_was_cut_off_is_resumed_or_begun_again(scratch, server, then):
    server.mode = "cut"
    said = refusal(fetch, server.address, scratch)
    assert re.search(f"of {len(CONTENT)} bytes.*the same command resumes", said)
    assert not list(scratch.rglob("a.tar.gz"))
    server.mode = then
    assert fetch(server.address, scratch).read_bytes() == CONTENT
    kept = int(server.asked[1].removeprefix("bytes=").removesuffix("-"))
    assert len(CONTENT) // 4 < kept <= len(CONTENT) // 2


def test_a_partial_file_longer_than_the_whole_is_begun_again(scratch, server):
    folder = scratch / hashlib.sha256(server.address.encode()).hexdigest()[:16]
    folder.mkdir()
    (folder / "a.tar.gz.part").write_bytes(CONTENT + b"more")
    assert fetch(server.address, scratch).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("mode", "message"), [("missing", "answered 404"), ("silent", "no answer within")]
)
def test_a_host_that_does_not_give_the_file_is_given_up_on(
    scratch, server, monkeypatch, mode, message
):
    monkeypatch.setattr(download, "ROUTE_SECONDS", 0.1 if mode == "silent" else 8)
    server.mode = mode
    assert message in refusal(fetch, server.address, scratch)
    server.given_up.set()  # the server would have waited


def test_a_full_disk_is_one_line(scratch, server, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(OSError(28, "No space left on device")))
    said = refusal(fetch, server.address, scratch)
    assert "a.tar.gz.part cannot be written: No space left" in said


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("http://127.0.0.1:9/", "names no file"),
        ("http://127.0.0.1:9/a/..", "names no file"),
        ("http://[::1/x", "archive=http://[::1/x is not an address: Invalid IPv6"),
        ("http://127.0.0.1:99999/x", "cannot be asked"),
        ("http://\udce9/x", "cannot be asked"),
        ("https://127.0.0.1:9/a", "invalid path: /no/such.pem (REQUESTS_CA_BUNDLE"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_one_line(scratch, monkeypatch, address, why):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such.pem")
    assert why in refusal(fetch, address, scratch)


def test_without_a_home_a_download_says_that_it_has_no_place():
    assert "no home directory" in refusal(fetch, "http://127.0.0.1:9/a", None)


def test_a_length_that_is_no_number_counts_as_none(scratch, server):
    server.mode = "no length"
    assert fetch(server.address, scratch).read_bytes() == CONTENT


SSL = (
    "HTTPSConnectionPool(host='h', port=443): Max retries exceeded (Caused by SSLError("
    "SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "
    "self-signed certificate (_ssl.c:1006)')))"
)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (requests.exceptions.SSLError(SSL), "certificate verify failed: self-signed certificate)"),
        (requests.ConnectTimeout(), "no answer within 8 seconds"),
        (requests.ConnectionError(), "no route to it (ConnectionError)"),
        (ValueError("Invalid\nport"), "cannot be asked (ValueError: Invalid port)"),
    ],
)
def test_why_a_host_cannot_be_asked_is_told_truly(scratch, monkeypatch, raised, told):
    monkeypatch.setattr(requests, "get", failing(raised))
    assert told in refusal(fetch, "https://h/a", scratch)


@pytest.fixture
def several(server, monkeypatch):
    """Downloads with `fetch_known` from paths of the server, each at its rate in bytes per second
    by a clock of its own; returns the paths that were asked, and if each was resumed.
    """
    now, asked = [0.0], []
    monkeypatch.setattr(download, "clock", lambda: now[0])
    real = download._open

    def opened(url, have, *rest):
        asked.append((url.split("/")[-2], have > 0))
        return real(url, have, *rest)

    monkeypatch.setattr(download, "_open", opened)

    def get(directory, rates, checksum=CHECKSUM):
        asked.clear()
        before = [0]

        def progress(_, done, total):
            now[0] += max(0, done - before[0]) / rates[asked[-1][0]]
            before[0] = done

        start = server.address.removesuffix("some%20dir/a.tar.gz")
        addresses = {f"{start}{name}/a.tar.gz": checksum for name in rates}
        path = download.fetch_known(addresses, directory, progress)
        assert path.read_bytes() == CONTENT
        return list(asked)

    return get


SLOW, FAST = 75_000, 1_000_000


ADDRESSES = {
    "slow one": ({"slow": SLOW, "fast": FAST}, [("slow", False), ("fast", False)]),
    "fast one": ({"fast": FAST, "slow": SLOW}, [("fast", False)]),
    "missing": ({"missing": FAST, "fast": FAST}, [("missing", False), ("fast", False)]),
    "all slow": (
        {"slow": SLOW, "better": 2 * SLOW, "slowest": SLOW / 2},
        [("slow", False), ("better", False), ("slowest", False), ("better", True)],
    ),
}


@pytest.mark.parametrize(("rates", "asked"), ADDRESSES.values(), ids=ADDRESSES)
def test_an_address_is_left_for_the_next_and_of_slow_ones_the_fastest_resumed(
    scratch, several, rates, asked
):
    assert several(scratch, rates) == asked


def test_the_address_of_which_most_is_there_comes_first(scratch, several, server):
    server.mode = "cut"
    assert "the same command resumes" in refusal(several, scratch, {"b": FAST})
    server.mode = "well"
    assert several(scratch, {"a": FAST, "b": FAST}) == [("b", True)]
    assert several(scratch, {"a": FAST, "b": FAST}) == []


def test_a_file_of_another_checksum_is_not_kept_and_every_failure_is_named(scratch, several):
    said = refusal(several, scratch, {"other": FAST, "missing": FAST}, checksum="0" * 64)
    assert re.search(r"other/a\.tar\.gz: its file has an.*; .*answered 404", said)
    assert not list(scratch.rglob("a.tar.gz"))


def test_silent_hosts_share_the_time_that_the_user_waits(scratch, server, several, monkeypatch):
    monkeypatch.setattr(download, "ROUTE_SECONDS", 0.1)
    waited = []
    join = threading.Thread.join
    monkeypatch.setattr(
        threading.Thread, "join", lambda self, *of: waited.extend(of) or join(self, *of)
    )
    server.mode = "silent"
    said = refusal(several, scratch, {"a": FAST, "b": FAST})
    assert said.count("no answer within") == 2
    assert waited == [0.05, 0.05]
    server.given_up.set()
