"""A web server with ranges, and a proxy before any server that counts, and that fails as it is told. On loopback."""

import contextlib
import hashlib
import http.client
import json
import re
import socket
import threading
from collections import deque
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape


def served(folder):
    """The files of a folder as a server has them, below ``m/``."""
    return {f"m/{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *parts):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._open = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def get_request(self):
        request, address = super().get_request()
        self._open.add(request)
        return request, address

    def handle_error(self, request, address):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()
        for request in self._open:
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
        self._thread.join()


class Web(_Server):
    """Serves ``files``, from paths to bytes, as web servers do. ``tags``: whether it says what tells versions apart."""

    def __init__(self, files, *, ranges=True, tags="strong", needs=None):
        self.files, self.ranges, self.tags, self.needs = files, ranges, tags, needs
        super().__init__(_Files)


class _Files(_Quiet):
    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, *, head):
        server, body = self.server, self.server.files.get(unquote(self.path).lstrip("/"))
        if server.needs is not None and self.headers.get("Authorization") != server.needs:
            return self.say(401, {}, b"who are you?", head)
        if body is None:
            return self.say(404, {}, b"", head)
        tag = {"strong": '"{}"', "weak": 'W/"{}"', None: ""}[server.tags].format(hashlib.md5(body).hexdigest())
        headers = {"Last-Modified": formatdate(1e9, usegmt=True), **({"ETag": tag} if tag else {})}
        if tag and (asked := self.headers.get("If-Match")) and (asked != tag or tag.startswith("W/")):
            return self.say(412, headers, b"", head)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or not server.ranges or head:
            return self.say(200, headers, body, head)
        first, last = int(match[1]), min(int(match[2] or len(body)), len(body) - 1)
        if first >= len(body):
            return self.say(416, {**headers, "Content-Range": f"bytes */{len(body)}"}, b"", head)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        return self.say(206, headers, memoryview(body)[first : last + 1], head)

    def say(self, status, headers, body, head):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(body)


class Bucket(Web):
    """Serves ``files`` as an S3 does that needs no signature: the bucket is ``b``, and it can be listed, by pages."""

    page = 1000

    def __init__(self, files, **options):
        super().__init__(files, **options)
        self.RequestHandlerClass = _InBucket
        self.options = {"endpoint": self.url, "skip_signature": True, "region": "us-east-1"}


_TIME = "2026-01-01T00:00:00.000Z"


class _InBucket(_Files):
    def answer(self, *, head):
        path, _, query = self.path.partition("?")
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        if "list-type" in asked:
            return self.say(200, {"Content-Type": "application/xml"}, self.listed(asked).encode(), head)
        self.path = path.removeprefix("/b")
        return super().answer(head=head)

    def listed(self, asked):
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter")
        found = {}  # in the order of keys, folders among them
        for key in sorted(self.server.files):
            if key.startswith(prefix):
                name, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
                found[f"{prefix}{name}{cut}" if cut else key] = bool(cut)
        begin = int(asked.get("continuation-token", 0))
        rows = list(found.items())[begin : begin + self.server.page]
        text = "".join(
            f"<CommonPrefixes><Prefix>{escape(key)}</Prefix></CommonPrefixes>" if folder else self.one(key)
            for key, folder in rows
        )
        more = begin + len(rows) < len(found)
        token = f"<NextContinuationToken>{begin + len(rows)}</NextContinuationToken>" if more else ""
        return f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{text}</ListBucketResult>"

    def one(self, key):
        body = self.server.files[key]
        tag = hashlib.md5(body).hexdigest()
        facts = f"<Size>{len(body)}</Size><ETag>&quot;{tag}&quot;</ETag><LastModified>{_TIME}</LastModified>"
        return f"<Contents><Key>{escape(key)}</Key>{facts}</Contents>"


SIGNATURE = "hush"  # in the addresses to which a hub leads


class HubServer(_Server):
    """A hub with one model, whose weights a second server has: the hub leads there, with a signature.

    ``asked`` lists (path, authorization) of all requests to the hub; ``cdn.asked`` those to the second server.
    """

    commit = "c0ffee" + "0" * 34

    def __init__(self, files, *, repo="org/name", token=None, renamed=None):
        self.files, self.repo, self.token, self.renamed = files, repo, token, renamed
        self.ranges, self.tags, self.needs, self.asked = True, "strong", None, []
        self.cdn = _Server(_Signed)
        self.cdn.files, self.cdn.ranges, self.cdn.tags, self.cdn.needs, self.cdn.asked = files, True, "strong", None, []
        super().__init__(_OfHub)

    def __exit__(self, *error):
        self.cdn.__exit__()
        super().__exit__(*error)


class _OfHub(_Files):
    def answer(self, *, head):
        hub, path = self.server, self.path
        hub.asked.append((path, self.headers.get("Authorization")))
        if hub.renamed is not None and (moved := path.replace(f"/{hub.renamed}/", f"/{hub.repo}/", 1)) != path:
            return self.say(307, {"Location": moved}, b"", head)
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.say(401, {"X-Error-Code": "GatedRepo"}, b"Access to this model is restricted", head)
        revisions = ("main", "refs%2Fpr%2F1", hub.commit)
        if path in (f"/api/models/{hub.repo}/revision/{each}" for each in revisions):
            siblings = [{"rfilename": name} for name in hub.files]
            said = {"id": hub.repo, "sha": hub.commit, "siblings": siblings}
            return self.say(200, {}, json.dumps(said).encode(), head)
        match = re.fullmatch(rf"/{hub.repo}/resolve/([^/]+)/(.+)", path)
        if match is None or match[1] not in revisions or unquote(match[2]) not in hub.files:
            return self.say(404, {"X-Error-Code": "EntryNotFound"}, b"", head)
        body = hub.files[unquote(match[2])]
        if not match[2].endswith(".safetensors"):
            self.path = f"/{match[2]}"
            return super().answer(head=head)
        tag = hashlib.sha256(body).hexdigest()
        linked = {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(body)), "Accept-Ranges": "bytes"}
        return self.say(302, {**linked, "Location": f"{hub.cdn.url}/{match[2]}?signature={SIGNATURE}"}, b"", head)

    def say(self, status, headers, body, head):
        super().say(status, {"X-Repo-Commit": self.server.commit, **headers}, body, head)


class _Signed(_Files):
    def answer(self, *, head):
        self.server.asked.append((self.path, self.headers.get("Authorization"), self.headers.get("Range")))
        self.path, _, signature = self.path.partition("?")
        return super().answer(head=head) if signature == f"signature={SIGNATURE}" else self.say(403, {}, b"", head)


class Proxy(_Server):
    """Passes requests on to ``url``. Each ``GET`` of weights takes the next of ``faults`` upon it, if there is one.

    ``asked`` lists (method, path, range) of all requests, ``nbytes`` counts the bytes of their bodies.
    A fault is a function of the handler and the answer: (status, headers, body). It may change it, or return ``None``
    if it has answered, or broken the connection, itself.
    """

    def __init__(self, url):
        self.upstream = url.removeprefix("http://")
        self.faults = deque()
        self.always = None  # a fault for every request that has no other
        # The same for what changes something. The server has done it by then: it is the answer that is lost.
        self.faults_of_writes, self.always_of_writes = deque(), None
        self.asked = []
        self.nbytes = 0
        self.released = threading.Event()  # ends what stalls
        self.lock = threading.Lock()
        super().__init__(_Passing)

    def __exit__(self, *error):
        self.released.set()
        super().__exit__(*error)

    @property
    def ranges(self):
        return [span for method, _, span in self.asked if method == "GET" and span]


class _Passing(_Quiet):
    def do_GET(self):
        proxy, span = self.server, self.headers.get("Range")
        length = int(self.headers.get("Content-Length") or 0)
        sent = self.rfile.read(length) if length else None
        with proxy.lock:
            proxy.asked.append((self.command, self.path, span))
            fault = proxy.always
            if self.command == "GET" and span and proxy.faults:
                fault = proxy.faults.popleft()
            if self.command not in ("GET", "HEAD"):
                fault = proxy.always_of_writes or fault
                fault = proxy.faults_of_writes.popleft() if proxy.faults_of_writes else fault
        upstream = http.client.HTTPConnection(proxy.upstream, timeout=20)
        try:
            upstream.request(self.command, self.path, sent, dict(self.headers))
            got = upstream.getresponse()
            body = got.read()
            headers = {name: value for name, value in got.getheaders() if name.lower() not in _OF_A_HOP}
            answer = got.status, headers, body
            length = got.headers.get("Content-Length")
        finally:
            upstream.close()
        if fault is not None:
            answer = fault(self, *answer)
        if answer is None:
            self.close_connection = True
            return
        status, headers, body = answer
        with proxy.lock:
            proxy.nbytes += len(body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET


_OF_A_HOP = ("content-length", "transfer-encoding", "connection", "date", "server", "keep-alive")


# Faults.


def status(code, text=b""):
    """The server is too busy, or refuses."""
    return lambda handler, *answer: (code, {}, text)


def reset(handler, *answer):
    """The connection ends before an answer."""
    _break(handler)


def silent(handler, *answer):
    """No answer, not even its beginning."""
    handler.server.released.wait(30)
    _break(handler)


def cut(part):
    """The connection ends within the body, after this part of it."""

    def fault(handler, code, headers, body):
        _begin(handler, code, headers, len(body))
        handler.wfile.write(body[: int(len(body) * part)])
        handler.wfile.flush()
        handler.close_connection = True  # No reset: that would throw away what is on its way.

    return fault


def stall(part):
    """The body comes so far, and then nothing more."""

    def fault(handler, code, headers, body):
        _begin(handler, code, headers, len(body))
        handler.wfile.write(body[: int(len(body) * part)])
        handler.wfile.flush()
        handler.server.released.wait(30)
        _break(handler)

    return fault


def other_range(handler, code, headers, body):
    """Bytes of another range, and says so."""
    first, last, size = map(int, re.match(r"bytes (\d+)-(\d+)/(\d+)", headers["Content-Range"]).groups())
    return code, {**headers, "Content-Range": f"bytes {first + 1}-{last + 1}/{size}"}, body


def shorter(handler, code, headers, body):
    """A part of the range, as if it were all."""
    return code, headers, body[:-1]


def _begin(handler, code, headers, nbytes):
    handler.send_response(code)
    for name, value in {**headers, "Content-Length": str(nbytes)}.items():
        handler.send_header(name, value)
    handler.end_headers()


def _break(handler):
    handler.close_connection = True
    with contextlib.suppress(OSError):
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        handler.connection.shutdown(socket.SHUT_RDWR)
