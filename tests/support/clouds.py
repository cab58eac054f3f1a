"""Small servers that speak as Google's and Azure's stores do, as far as they are asked. The bucket is ``b``.

``asked`` lists (method, path, query, headers) of all requests. ``needs`` is what Authorization must begin with.
"""

import hashlib
import json
import re
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

from web import _Files, _Server


class Cloud(_Server):
    """``files``, from keys to bytes. Each time that one is written it has another of ``generations``."""

    def __init__(self, files=(), *, needs=""):
        self.files, self.needs, self.ranges, self.tags = {}, None, True, "strong"
        self.begins, self.generations, self.asked = needs, {}, []
        for key, body in dict(files).items():
            self.write(key, body)
        super().__init__(self.speaks)

    def write(self, key, body):
        self.files[key] = body
        self.generations[key] = max(self.generations.values(), default=1_700_000_000_000_000) + 1


class _InCloud(_Files):
    def answer(self, *, head):
        self.take("GET", head=head)

    def do_PUT(self):
        self.take("PUT")

    def do_DELETE(self):
        self.take("DELETE")

    def do_POST(self):
        self.take("POST")

    def take(self, method, *, head=False):
        path, _, query = self.path.partition("?")
        query = {name: values[0] for name, values in parse_qs(query, keep_blank_values=True).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, path, query, dict(self.headers)))
        if not self.headers.get("Authorization", "").startswith(self.server.begins):
            return self.say(401, {}, b"<Error><Code>AuthenticationRequired</Code></Error>", head)
        self.path = path.removeprefix(self.prefix).lstrip("/")
        return self.respond(method, unquote(self.path), query, head)

    def refused(self, key):
        """The status of a condition that does not hold."""
        wanted, tag = self.headers.get("If-Match"), self.headers.get("If-None-Match")
        if wanted is not None and wanted != self.tag(key):
            return 412
        return 409 if tag == "*" and key in self.server.files else None

    def put(self, key, status):
        if refusal := self.refused(key):
            return self.say(refusal, {}, b"<Error><Code>ConditionNotMet</Code></Error>", False)
        self.server.write(key, self.body)
        return self.say(status, self.facts(key), b"", False)

    def facts(self, key):
        return {"ETag": self.tag(key)}

    def tag(self, key):
        body = self.server.files.get(key)
        return None if body is None else f'"{hashlib.md5(body).hexdigest()}"'

    def found(self, asked):
        """What a list tells: rows of (key, whether it is a folder)."""
        prefix, delimiter, found = asked.get("prefix", ""), asked.get("delimiter"), {}
        for key in sorted(self.server.files):
            if key.startswith(prefix):
                name, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key[len(prefix) :], "", "")
                found[f"{prefix}{name}{cut}"] = bool(cut)
        return found.items()


class _OfGoogle(_InCloud):
    """The XML API, with generations."""

    prefix = "/b"

    def respond(self, method, key, query, head):
        if method == "PUT":
            return self.put(key, 200)
        if method == "DELETE":
            self.server.files.pop(key, None)
            return self.say(204, {}, b"", head)
        if not key:
            return self.say(200, {}, self.listed(query).encode(), head)
        return _Files.answer(self, head=head)

    def refused(self, key):
        wanted = self.headers.get("x-goog-if-generation-match")
        now = self.server.generations[key] if key in self.server.files else 0
        return super().refused(key) if wanted is None else 412 if int(wanted) != now else None

    def facts(self, key):
        return {"ETag": self.tag(key), "x-goog-generation": str(self.server.generations[key])}

    def say(self, status, headers, body, head):
        key = unquote(self.path)
        if status in (200, 206) and self.server.files.get(key) is not None:
            headers = {**headers, **self.facts(key)}
        return super().say(status, headers, body, head)

    def listed(self, query):
        rows = [
            f"<CommonPrefixes><Prefix>{escape(key)}</Prefix></CommonPrefixes>" if folder else self.one(key)
            for key, folder in self.found(query)
        ]
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(rows)}</ListBucketResult>"

    def one(self, key):
        facts = f"<Size>{len(self.server.files[key])}</Size><ETag>{escape(self.tag(key))}</ETag>"
        facts += f"<Generation>{self.server.generations[key]}</Generation>"
        return (
            f"<Contents><Key>{escape(key)}</Key>{facts}<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        )


class Google(Cloud):
    """Google's store."""

    speaks = _OfGoogle

    @property
    def options(self):
        """Those of an account that needs no login. Without any, obstore looks for a machine's before it writes."""
        account = {"gcs_base_url": self.url, "disable_oauth": True, "client_email": "", "private_key": ""}
        return {"service_account_key": json.dumps({**account, "private_key_id": ""}), "allow_http": True}


class _OfAzure(_InCloud):
    """Blobs of one container of the account ``account``."""

    prefix = "/account/b"

    def respond(self, method, key, query, head):
        if query.get("comp") == "batch":
            return self.batch()
        if method == "PUT":
            return self.put(key, 201)
        if not key:
            return self.say(200, {}, self.listed(query).encode(), head)
        return _Files.answer(self, head=head)

    def batch(self):
        """Deletes many: each part is a request, and each part of the answer its answer."""
        parts = []
        for number, target in enumerate(re.findall(rb"DELETE (\S+) HTTP/1.1", self.body)):
            self.server.files.pop(unquote(target.decode()).removeprefix(self.prefix).lstrip("/"), None)
            told = "HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
            parts.append(f"--x\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\n{told}")
        body = "".join(parts) + "--x--\r\n"
        self.say(202, {"Content-Type": "multipart/mixed; boundary=x"}, body.encode(), False)

    def listed(self, query):
        rows = [
            f"<BlobPrefix><Name>{escape(key)}</Name></BlobPrefix>" if folder else self.one(key)
            for key, folder in self.found(query)
        ]
        return f"<EnumerationResults><Blobs>{''.join(rows)}</Blobs><NextMarker /></EnumerationResults>"

    def one(self, key):
        facts = "<Last-Modified>Thu, 01 Jan 2026 00:00:00 GMT</Last-Modified><Content-Type>x</Content-Type>"
        facts += f"<Content-Length>{len(self.server.files[key])}</Content-Length>"
        facts += f"<Etag>{self.tag(key)[1:-1]}</Etag>"  # Unlike in headers, without quotes.
        return f"<Blob><Name>{escape(key)}</Name><Properties>{facts}</Properties></Blob>"


class Azure(Cloud):
    """Azure's store."""

    speaks = _OfAzure

    @property
    def options(self):
        return {"account_name": "account", "endpoint": f"{self.url}/account", "skip_signature": True}
