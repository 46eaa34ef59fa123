"""A stand-in on this machine for the API of the Hugging Face Hub: uploads, versions, downloads."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_writer"


class Hub(ThreadingHTTPServer):
    """Models with their commits in memory.

    `faults` is a list of [method, part of the path, status or "cut", times]; `requests` lists
    (method, path, token) of all requests.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.models = {}  # name -> {"private": bool, "refs": {name: sha}, "commits": {sha: files}}
        self.blobs = {}  # sha256 -> bytes, uploaded by LFS
        self.faults = []
        self.requests = []
        self.lock = threading.Lock()

    def fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault[0] == method and fault[1] in path and fault[3] > 0:
                    fault[3] -= 1
                    return fault[2]
        return None

    def commit(self, name, added, branch="main"):
        model = self.models[name]
        files = {**model["commits"].get(model["refs"].get(branch), {}), **added}
        text = json.dumps(sorted((k, hashlib.sha1(v).hexdigest()) for k, v in files.items()))
        sha = hashlib.sha1(f"{len(model['commits'])}{text}".encode()).hexdigest()
        model["commits"][sha] = files
        model["refs"][branch] = sha
        return sha


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does, as far as its client asks."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("HEAD")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def answer(self, method):
        path = unquote(urlsplit(self.path).path)
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((method, path, self.token))
        fault = self.server.fault(method, path)
        if isinstance(fault, int):
            return self.reply(fault, {"error": "as told"})
        routes = (
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", lambda body: self.reply(200, {"errors": []})),
            ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<rev>.+)", self.preupload),
            ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<rev>.+)", self.commit),
            ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            ("PUT", r"/lfs/(?P<oid>\w+)", self.upload),
            ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<rev>.+))?", self.info),
            ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)", self.tree),
            (
                "HEAD|GET",
                r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)",
                lambda body, **found: self.resolve(method, fault == "cut", **found),
            ),
        )
        for methods, pattern, handle in routes:
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(methods, method):
                return handle(body, **match.groupdict())
        return self.reply(404, {"error": f"no {method} {path}"})

    def reply(self, status, content, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -------------------------------------------------------------------------- writing
    def create(self, body):
        asked = json.loads(body)
        if self.token != TOKEN:
            headers = {"X_Error_Message": "Invalid username or password."}
            return self.reply(401, {"error": "Invalid username or password."}, **headers)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.server.models:
            return self.reply(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.server.models[name] = {"private": private, "refs": {}, "commits": {}}
        self.server.commit(name, {".gitattributes": b""})
        return self.reply(200, {"url": f"{self.server.url}/{name}", "name": name})

    def preupload(self, body, name, rev):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs"
                if file["path"].endswith((".safetensors", ".png"))
                else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.reply(200, {"files": files})

    def batch(self, body, name):
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self.reply(200, {"transfer": "basic", "objects": objects})

    def upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.reply(422, {"error": "wrong checksum"})
        self.server.blobs[oid] = body
        return self.reply(200, {})

    def commit(self, body, name, rev):
        added = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                added[value["path"]] = self.server.blobs[value["oid"]]
        sha = self.server.commit(name, added, rev)
        self.reply(200, {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    # -------------------------------------------------------------------------- reading
    def found(self, name, rev):
        """The commit of a revision; None after an answer that there is none."""
        model = self.server.models.get(name)
        if model is None or (model["private"] and self.token != TOKEN):
            self.reply(401 if not self.token else 404, {}, X_Error_Code="RepoNotFound")
            return None
        sha = model["refs"].get(rev, rev)
        if sha not in model["commits"]:
            self.reply(404, {"error": "Invalid rev"}, X_Error_Code="RevisionNotFound")
            return None
        return sha

    def info(self, body, name, rev=None):
        if sha := self.found(name, rev or "main"):
            files = self.server.models[name]["commits"][sha]
            siblings = [{"rfilename": file} for file in files]
            self.reply(200, {"id": name, "sha": sha, "siblings": siblings, "private": False})

    def tree(self, body, name, rev):
        if sha := self.found(name, rev):
            files = self.server.models[name]["commits"][sha]
            self.reply(
                200,
                [
                    {"type": "file", "path": path, "size": len(data), **self.ids(data)}
                    for path, data in files.items()
                ],
            )

    def ids(self, data):
        oid = hashlib.sha256(data).hexdigest()
        own = {"oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        if oid in self.server.blobs:
            own["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
        return own

    def resolve(self, method, cut, name, rev, file):
        if not (sha := self.found(name, rev)):
            return None
        data = self.server.models[name]["commits"][sha].get(file)
        if data is None:
            return self.reply(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        ids = self.ids(data)
        etag = ids["lfs"]["oid"] if "lfs" in ids else ids["oid"]
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        status, begin = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, begin = 206, int(match[1])
            headers["Content_Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if not cut:
            return self.reply(status, data[begin:], **headers)
        self.send_response(status)
        for key, value in {"Content-Length": len(data) - begin, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data[begin : begin + (len(data) - begin) // 2])
        self.close_connection = True
        return None
