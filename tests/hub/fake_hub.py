"""A Hub of our own on 127.0.0.1, as far as pushing and pulling needs its HTTP interface (standard library only).

Blobs lie in `blobs` under their sha256; a repository is {branch: [commit, ...]}, a commit {path: (sha256, is_lfs)}.
`log` lists (method, path, status) of what clients asked for; `failures` makes chosen requests fail.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".onnx", ".parquet", ".model")
REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{REPO}"
PREFIX = r"/(?:(?P<prefix>datasets|spaces)/)?"
REVISION = r"(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+)"


def git_oid(data: bytes) -> str:
    """What git calls a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubError(Exception):
    """An answer other than 200: status, the Hub's code for it, a message."""

    def __init__(self, status: int, code: str, message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class FakeHub:
    """Context manager that serves at `url`; `token` is the only one that may write and see private repositories."""

    def __init__(self, user: str = "user", token: str = "hf_right"):
        self.user, self.token = user, token
        self.repos: dict[tuple[str, str], dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[tuple[str, str, int]] = []
        self.failures: list[tuple[str, str]] = []  # (method, pattern) of requests that fail, each once
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def commits(self, repo_id: str, branch: str = "main", kind: str = "models") -> list[dict]:
        """The commits of a branch, oldest first; the first is the empty repository's."""
        return self.repos[kind, repo_id]["branches"][branch]

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """Path -> content at the head of a branch."""
        head = self.commits(repo_id, branch)[-1]["files"]
        return {path: self.blobs[sha] for path, (sha, _) in head.items()}

    def repo(self, kind, repo_id, seen=True):
        """The repository, which a client that may not see it (private, no token) cannot tell from one that is not there."""
        if (kind, repo_id) not in self.repos or not seen:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.repos[kind, repo_id]

    def commit_at(self, kind, repo_id, revision):
        """The commit that a branch, tag or (shortened) commit id names."""
        repo = self.repo(kind, repo_id)
        revision = repo["tags"].get(revision, revision)
        if revision in repo["branches"]:
            return repo["branches"][revision][-1]
        for commits in repo["branches"].values():
            for each in commits:
                if len(revision) >= 7 and each["id"].startswith(revision):
                    return each
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def commit(self, kind, repo_id, revision, lines):
        """Apply the lines of a commit request, all or nothing."""
        head = self.commit_at(kind, repo_id, revision)
        files, title = dict(head["files"]), ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") and not head["id"].startswith(value["parentCommit"]):
                    raise HubError(412, "PreconditionFailed", "A commit has happened since.")
            elif key == "file":
                files[value["path"]] = (self.put(base64.b64decode(value["content"])), False)
            elif key == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise HubError(400, "BadRequest", f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = (value["oid"], True)
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: file for path, file in files.items() if not path.startswith(folder)}
        return self.add_commit(self.repo(kind, repo_id), revision, files, title)

    def add_commit(self, repo, revision, files, title):
        """Append a commit to a branch."""
        number = sum(map(len, repo["branches"].values()))
        oid = hashlib.sha1(json.dumps([number, title, sorted(files.items())]).encode()).hexdigest()
        commits = repo["branches"].setdefault(revision, [])
        commits.append({"id": oid, "title": title, "files": files})
        return commits[-1]

    def put(self, data: bytes) -> str:
        """Store bytes; returns their sha256."""
        sha = hashlib.sha256(data).hexdigest()
        self.blobs[sha] = data
        return sha

    def entry(self, path, sha, lfs):
        """What listings say about a file."""
        data = self.blobs[sha]
        found = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        return found | ({"lfs": {"oid": sha, "size": len(data), "pointerSize": 134}} if lfs else {})

    def info(self, kind, repo_id, revision):
        """What `model_info` shows."""
        commit = self.commit_at(kind, repo_id, revision)
        return {
            "_id": "0", "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": commit["id"],
            "private": self.repo(kind, repo_id)["private"], "gated": False, "disabled": False, "downloads": 0, "likes": 0,
            "tags": [], "config": {}, "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(commit["files"])],
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """Finds the route of a request, checks the token, and answers."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = (
        True  # headers and body are two packets; the second would wait 40 ms for the first's receipt
    )

    def log_message(self, *_):
        """Nothing on the console: requests are in `hub.log`."""

    def reply(self, status=200, body=b"", content_type="application/json", headers=()):
        """Send bytes, or anything else as JSON."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.hub.log.append((self.command, unquote(self.path), status))
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                raw += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return raw

    def may(self) -> bool:
        """Whether the request carries the right token."""
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _fails(self, path) -> bool:
        for failure in self.hub.failures:
            if failure[0] == self.command and re.search(failure[1], path):
                self.hub.failures.remove(failure)
                return True
        return False

    def dispatch(self):
        """Answer one request."""
        raw, split = self._body(), urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        try:
            with self.hub.lock:
                if self._fails(path):
                    raise HubError(403, "Forbidden", "the connection broke (asked for by a test)")
                for methods, pattern, function in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match is None or self.command not in methods:
                        continue
                    if self.command not in ("GET", "HEAD") and not path.startswith("/_lfs") and not self.may():
                        raise HubError(401, "Unauthorized", "Invalid username or password.")
                    names = match.groupdict()
                    kind, repo_id = names.get("kind") or names.get("prefix") or "models", names.get("repo_id")
                    if repo_id and self.hub.repo(kind, repo_id)["private"] and not self.may():
                        self.hub.repo(kind, repo_id, seen=False)
                    return function(self, self.hub, raw, **names)
            raise HubError(404, "NotFound", f"no route for {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.reply(error.status, {"error": error.message}, headers=headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch


def whoami(handler, hub, raw):
    """Who a token belongs to."""
    if not handler.may():
        raise HubError(401, "Unauthorized", "Invalid username or password.")
    access = {"type": "access_token", "accessToken": {"displayName": "fake", "role": "write"}}
    handler.reply(200, {"type": "user", "id": "0", "name": hub.user, "fullname": hub.user, "orgs": [], "auth": access})


def _named(hub, raw):
    asked = json.loads(raw)
    return asked, asked.get("type", "model") + "s", f"{asked.get('organization') or hub.user}/{asked['name']}"


def create(handler, hub, raw):
    """Make a repository with one commit; 409 if it is there."""
    asked, kind, repo_id = _named(hub, raw)
    url = f"{hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
    if (kind, repo_id) in hub.repos:
        return handler.reply(409, {"error": "You already created this repo", "url": url})
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    hub.repos[kind, repo_id] = repo = {"branches": {}, "tags": {}, "private": private}
    attributes = hub.put(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    hub.add_commit(repo, "main", {".gitattributes": (attributes, False)}, "initial commit")
    handler.reply(200, {"url": url, "name": repo_id, "id": "0"})


def delete(handler, hub, raw):
    """Remove a repository."""
    _, kind, repo_id = _named(hub, raw)
    hub.repo(kind, repo_id)
    del hub.repos[kind, repo_id]
    handler.reply(200, {})


def preupload(handler, hub, raw, kind, repo_id, revision):
    """How each file is to be sent, and what the Hub has under its name."""
    have = hub.commit_at(kind, repo_id, revision)["files"]

    def known(path):
        if path not in have:
            return None
        sha, lfs = have[path]
        return sha if lfs else git_oid(hub.blobs[sha])

    def mode(file):
        return "lfs" if file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10 << 20 else "regular"

    asked = json.loads(raw)["files"]
    answer = [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False, "oid": known(f["path"])} for f in asked]
    handler.reply(200, {"files": answer})


def lfs_batch(handler, hub, raw, prefix, repo_id):
    """Where to send large files; without "actions" the client skips what the server has."""
    objects = json.loads(raw)["objects"]
    for each in objects:
        if each["oid"] not in hub.blobs:
            upload = {"href": f"{hub.url}/_lfs/{each['oid']}"}
            each["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/_lfs/verify"}}
    body = {"transfer": "basic", "objects": objects}
    handler.reply(200, body, content_type="application/vnd.git-lfs+json")


def lfs_put(handler, hub, raw, oid):
    """Take a large file."""
    if hub.put(raw) != oid:
        raise HubError(422, "BadOid", "sha256 of the body differs")
    handler.reply(200)


def lfs_verify(handler, hub, raw):
    """Say whether a large file arrived."""
    asked = json.loads(raw)
    handler.reply(200 if len(hub.blobs.get(asked["oid"], b"")) == asked["size"] else 404, {})


def commit(handler, hub, raw, kind, repo_id, revision):
    """A commit to a branch, or a pull request with it."""
    answer, branches = {"success": True}, hub.repo(kind, repo_id)["branches"]
    if handler.query.get("create_pr") == ["1"]:
        number = sum(name.startswith("refs/pr/") for name in branches) + 1
        head, revision = hub.commit_at(kind, repo_id, revision), f"refs/pr/{number}"
        branches[revision] = [head]
        answer["pullRequestUrl"] = f"{hub.url}/{repo_id}/discussions/{number}"
    made = hub.commit(kind, repo_id, revision, [json.loads(line) for line in raw.splitlines() if line.strip()])
    handler.reply(200, answer | {"commitOid": made["id"], "commitUrl": f"{hub.url}/{repo_id}/commit/{made['id']}"})


def branch(handler, hub, raw, kind, repo_id, name):
    """Make a branch."""
    repo, start = hub.repo(kind, repo_id), json.loads(raw or b"{}").get("startingPoint", "main")
    if name in repo["branches"]:
        raise HubError(409, "Conflict", "Reference already exists")
    repo["branches"][name] = [hub.commit_at(kind, repo_id, start)]
    handler.reply(200, {})


def tag(handler, hub, raw, kind, repo_id, revision):
    """Make a tag."""
    hub.repo(kind, repo_id)["tags"][json.loads(raw)["tag"]] = hub.commit_at(kind, repo_id, revision)["id"]
    handler.reply(200, {})


def info(handler, hub, raw, kind, repo_id, revision=None):
    """A repository at a revision."""
    handler.reply(200, hub.info(kind, repo_id, revision or "main"))


def tree(handler, hub, raw, kind, repo_id, revision, path=None):
    """The files of a folder; no folders in ours, so the listing is flat."""
    files, base = hub.commit_at(kind, repo_id, revision)["files"], (path or "").strip("/")
    if base:
        files = {name: file for name, file in files.items() if name.startswith(base + "/")}
        if not files:
            raise HubError(404, "EntryNotFound", f"{base} does not exist on {revision}")
    handler.reply(200, [hub.entry(name, sha, lfs) for name, (sha, lfs) in sorted(files.items())])


def paths_info(handler, hub, raw, kind, repo_id, revision):
    """Some files."""
    body = raw.decode()
    paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
    files = hub.commit_at(kind, repo_id, revision)["files"]
    handler.reply(200, [hub.entry(path, *files[path]) for path in paths if path in files])


def refs(handler, hub, raw, kind, repo_id):
    """Branches and tags."""
    repo = hub.repo(kind, repo_id)
    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo["tags"].items()]
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1]["id"]}
        for name, commits in repo["branches"].items()
        if not name.startswith("refs/")
    ]
    handler.reply(200, {"converts": [], "pullRequests": [], "tags": tags, "branches": branches})


def resolve(handler, hub, raw, prefix, repo_id, revision, path):
    """A file's bytes, whole or a range."""
    commit = hub.commit_at(prefix or "models", repo_id, revision)
    if path not in commit["files"]:
        raise HubError(404, "EntryNotFound", "Entry not found")
    sha, lfs = commit["files"][path]
    data = hub.blobs[sha]
    etag = sha if lfs else git_oid(data)
    headers = {"X-Repo-Commit": commit["id"], "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    if lfs:
        headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
    if wanted:
        first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return handler.reply(206, data[first : last + 1], "application/octet-stream", headers)
    handler.reply(200, data, "application/octet-stream", headers)


def validate_card(handler, hub, raw):
    """Accept a card: what the Hub checks itself is checked in the tests of our cards."""
    handler.reply(200, {"errors": [], "warnings": []})


ROUTES = [
    (("GET",), r"/api/whoami-v2", whoami),
    (("POST",), r"/api/repos/create", create),
    (("DELETE",), r"/api/repos/delete", delete),
    (("POST",), r"/api/validate-yaml", validate_card),
    (("POST",), API + r"/preupload/(?P<revision>.+)", preupload),
    (("POST",), API + r"/commit/(?P<revision>.+)", commit),
    (("POST",), API + r"/branch/(?P<name>.+)", branch),
    (("POST",), API + r"/tag/(?P<revision>.+)", tag),
    (("POST",), API + r"/paths-info/(?P<revision>.+)", paths_info),
    (("GET",), API + r"/refs", refs),
    (("GET",), API + r"/tree/" + REVISION + r"(?P<path>/.*)?", tree),
    (("GET",), API + r"(?:/revision/(?P<revision>.+))?", info),
    (("POST",), PREFIX + REPO + r"\.git/info/lfs/objects/batch", lfs_batch),
    (("PUT",), r"/_lfs/(?P<oid>[0-9a-f]{64})", lfs_put),
    (("POST",), r"/_lfs/verify", lfs_verify),
    (("GET", "HEAD"), PREFIX + REPO + r"/resolve/" + REVISION + r"/(?P<path>.+)", resolve),
]
