"""A small Hugging Face Hub on this machine: it answers what the library asks to read and write."""

import base64
import hashlib
import http.server
import json
import re
import threading
import time

TOKEN = "hf_of_the_test"
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>[\w-]+)/(?P<revision>[^/?]+)")
LFS = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


class Hub:
    """The server and what it has.

    Attributes:
        repositories: dict of "user/name" to its commits, each a dict of a file's path to its bytes.
        requests: list of (method, path), in order.
        ranges: list of the `Range` headers that were asked for.
        breaks: the connection is dropped once after so many bytes of a weight file; None: never.
        dropped: int, how often that happened.
    """

    def __init__(self):
        self.repositories, self.objects = {}, {}
        self.requests, self.ranges = [], []
        self.breaks, self.dropped = None, 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def commit(self, repo, files):
        """Adds a commit, whose number is the SHA-1 of how many there are."""
        commits = self.repositories.setdefault(repo, {})
        name = hashlib.sha1(f"{repo}{len(commits)}".encode()).hexdigest()
        commits[name] = files
        return name

    def head(self, repo):
        """The files of the newest commit."""
        return list(self.repositories[repo].values())[-1]

    def find(self, repo, revision):
        """(commit, files), or the code of the error."""
        commits = self.repositories.get(repo)
        if commits is None:
            return "RepoNotFound"
        revision = list(commits)[-1] if revision == "main" else revision
        return (revision, commits[revision]) if revision in commits else "RevisionNotFound"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *words):
        """Nothing is printed."""

    def _answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code):
        self._answer(404, {"error": code}, X_Error_Code=code)

    def _body(self):
        self.hub.requests.append((self.command, self.path))
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self):
        self._body()
        self._file()

    def do_GET(self):
        self._body()
        match = API.match(self.path)
        if match is None:
            self._file()
            return
        found = self.hub.find(match["repo"], match["revision"])
        if isinstance(found, str):
            self._missing(found)
            return
        commit, files = found
        if match["what"] == "tree":
            rows = [{"type": "file", "path": p, "size": len(b), "oid": _sha1(b)}
                    for p, b in files.items()]  # fmt: skip
            self._answer(200, rows, Content_Type="application/json")
        else:
            siblings = [{"rfilename": path} for path in files]
            self._answer(200, {"id": match["repo"], "sha": commit, "siblings": siblings})

    def _file(self):
        match = FILE.match(self.path)
        found = self.hub.find(match["repo"], match["revision"]) if match else "EntryNotFound"
        if isinstance(found, tuple) and match["path"] not in found[1]:
            found = "EntryNotFound"
        if isinstance(found, str):
            self._missing(found)
            return
        commit, body = found[0], found[1][match["path"]]
        headers = {"ETag": f'"{_sha1(body)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked is None:
            if self.command == "GET" and self.hub.breaks is not None and _is_large(match["path"]):
                self._break(body, headers)
                return
            self._answer(200, body, **headers)
            return
        self.hub.ranges.append(asked[0])
        first = int(asked[1])
        headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        self._answer(206, body[first:], **headers)

    def _break(self, body, headers):
        """Sends the first bytes, as if the network failed then."""
        self.send_response(200)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[: self.hub.breaks])
        self.wfile.flush()
        time.sleep(0.2)  # so that they arrive before the end of the connection does
        self.hub.breaks, self.close_connection = None, True
        self.hub.dropped += 1

    def do_POST(self):
        body = self._body()
        if self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := LFS.match(self.path):
            self._batch(match["repo"], json.loads(body))
        else:
            match = API.match(self.path)
            act = {"preupload": self._preupload, "commit": self._commit}[match["what"]]
            act(match["repo"], body)

    def _create(self, body):
        repo = "/".join(filter(None, (body.get("organization"), body["name"])))
        is_new = repo not in self.hub.repositories
        if is_new:
            self.hub.commit(repo, {".gitattributes": b""})
        address = f"{self.hub.address}/{repo}"
        self._answer(200 if is_new else 409, {"url": address, "name": repo})

    def _preupload(self, repo, body):
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": name, "uploadMode": "lfs" if _is_large(name) else "regular",
                  "shouldIgnore": False} for name in names]  # fmt: skip
        self._answer(200, {"files": modes})

    def _batch(self, repo, body):
        objects = [
            {**about, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{about['oid']}"}}}
            for about in body["objects"]
        ]
        self._answer(
            200,
            {"transfer": "basic", "objects": objects},
            Content_Type="application/vnd.git-lfs+json",
        )

    def do_PUT(self):
        self.hub.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer(200)

    def _commit(self, repo, body):
        files = dict(self.hub.head(repo))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        name = self.hub.commit(repo, files)
        address = f"{self.hub.address}/{repo}/commit/{name}"
        self._answer(200, {"commitUrl": address, "commitOid": name, "success": True})


def _is_large(path):
    return path.endswith(".safetensors")


def _sha1(body):
    return hashlib.sha1(body).hexdigest()
