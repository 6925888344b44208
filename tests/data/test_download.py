"""Downloads against a server on this machine: whole, cut off, resumed, refused, silent."""

import hashlib
import http.server
import os
import threading

import pytest

from jaxnorm.config import UserError
from jaxnorm.data import download

CONTENT = bytes(range(256)) * 20_000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the server's `mode` says how it misbehaves."""

    def do_GET(self):
        server = self.server
        start = 0
        server.asked.append(self.headers.get("Range"))
        if server.mode == "silent":
            server.given_up.wait(60)
            return
        if server.mode == "missing":
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
        self.send_header("Content-Length", str(len(CONTENT) - start))
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
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_download_is_whole_shows_progress_and_is_not_made_twice(scratch, server):
    seen = []
    path = download.fetch(server.address, scratch / "d", lambda *at: seen.append(at))
    assert path.read_bytes() == CONTENT
    assert path.name == "a.tar.gz"
    assert seen[-1] == ("downloading", len(CONTENT), len(CONTENT))
    assert len(seen) > 3
    download.fetch(server.address, scratch / "d", lambda *at: None)
    assert len(server.asked) == 1
    files = {file.name for file in (scratch / "d").rglob("*") if file.is_file()}
    assert files - {".lock"} == {"a.tar.gz"}
    again = server.address.replace("a.tar.gz", "other/a.tar.gz")
    assert download.fetch(again, scratch / "d", lambda *at: None) != path
    assert len(server.asked) == 2


@pytest.mark.parametrize("then", ["well", "whole again"])
def test_a_download_that_was_cut_off_is_resumed_or_begun_again(scratch, server, then):
    server.mode = "cut"
    with pytest.raises(UserError, match=f"of {len(CONTENT)} bytes.*the same command resumes"):
        download.fetch(server.address, scratch, lambda *at: None)
    assert not list(scratch.rglob("a.tar.gz"))
    server.mode = then
    assert download.fetch(server.address, scratch, lambda *at: None).read_bytes() == CONTENT
    kept = int(server.asked[1].removeprefix("bytes=").removesuffix("-"))
    assert len(CONTENT) // 4 < kept <= len(CONTENT) // 2


def test_a_partial_file_longer_than_the_whole_is_begun_again(scratch, server):
    folder = scratch / hashlib.sha256(server.address.encode()).hexdigest()[:16]
    folder.mkdir()
    (folder / "a.tar.gz.part").write_bytes(CONTENT + b"more")
    assert download.fetch(server.address, scratch, lambda *at: None).read_bytes() == CONTENT


def test_what_the_host_refuses_is_told(scratch, server):
    server.mode = "missing"
    with pytest.raises(UserError, match="answered 404"):
        download.fetch(server.address, scratch, lambda *at: None)


def test_a_host_that_does_not_answer_is_given_up_on(scratch, server, monkeypatch):
    monkeypatch.setattr(download, "ROUTE_SECONDS", 0.5)
    server.mode = "silent"
    with pytest.raises(UserError, match="no answer within"):
        download.fetch(server.address, scratch, lambda *at: None)
    server.given_up.set()  # the server would have waited


def test_a_full_disk_is_one_line(scratch, server, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a\.tar\.gz\.part cannot be written: No space left"):
        download.fetch(server.address, scratch, lambda *at: None)


def test_an_address_without_a_file_is_refused(scratch):
    with pytest.raises(UserError, match="names no file"):
        download.fetch("http://127.0.0.1:9/", scratch, lambda *at: None)
