"""As much of a wandb server as a run needs, on 127.0.0.1: it keeps histories by `_step`, and says how far a run is.

It is the other end of the wire, for the real package; written from what wandb 0.31 asks for. `mute` is a server that
accepts and never answers.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """`runs` by id: config, history (the rows, each `_step` once), exit code, whether it was marked as preempting.

    refuses: it knows the user and lets nobody have a run.
    """

    def __init__(self, refuses: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refuses = refuses
        self.runs: dict[str, dict[str, Any]] = {}
        self.base_url = f"http://127.0.0.1:{self.server_port}"

    def run(self, name: str) -> dict[str, Any]:
        new: dict[str, Any] = {"config": {}, "history": [], "exit_code": None, "preempting": False, "project": None}
        return self.runs.setdefault(name, new)


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: Any = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = _graphql(self.server, asked.get("operationName"), asked.get("variables") or {})
        elif self.path.endswith("/file_stream"):
            _stream(self.server.run(self.path.split("/")[-2]), json.loads(body))
        content = json.dumps(answer).encode()
        self.send_response(403 if self.server.refuses and b"Viewer" not in body else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST  # noqa: N815 - names of http.server


def _graphql(server: WandbServer, operation: str | None, given: dict[str, Any]) -> Any:
    entity = {"id": "E", "name": "me"}
    if operation == "Viewer":
        viewer = {"id": "V", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"data": {"viewer": viewer}}
    if operation == "RunResumeStatus":
        run = server.runs.get(given["name"])
        return {"data": {"model": {"id": "P", "name": "p", "entity": entity, "bucket": run and _bucket(given, run)}}}
    if operation == "UpsertBucket":
        run = server.run(given["name"])
        run["project"] = given.get("project") or run["project"]
        run["config"] |= {k: v["value"] for k, v in json.loads(given.get("config") or "{}").items() if k != "_wandb"}
        project = {"id": "P", "name": run["project"], "entity": entity}
        bucket = {"id": given["name"], "name": given["name"], "displayName": given.get("displayName")}
        return {"data": {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}}
    if operation == "CreateRunFiles":
        files = [{"name": name, "uploadUrl": f"{server.base_url}/upload"} for name in given["files"]]
        return {"data": {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}}
    return {"errors": [{"message": f"no such operation: {operation}"}]}


def _bucket(given: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    config = {name: {"value": value} for name, value in run["config"].items()}
    return {
        "id": given["name"],
        "name": given["name"],
        "displayName": given["name"],
        "summaryMetrics": "{}",
        "logLineCount": 0,
        "historyLineCount": len(run["history"]),
        "eventsLineCount": 0,
        "historyTail": json.dumps([json.dumps(row) for row in run["history"][-1:]]),
        "eventsTail": "[]",
        "config": json.dumps(config),
        "tags": [],
        "notes": None,
        "wandbConfig": '{"t": 1}',
    }


def _stream(run: dict[str, Any], sent: dict[str, Any]) -> None:
    chunk = sent.get("files", {}).get("wandb-history.jsonl")
    if chunk is not None:
        assert chunk["offset"] == len(run["history"]), "a row twice, or one left out"
        run["history"] += [json.loads(line) for line in chunk["content"]]
    run["preempting"] |= bool(sent.get("preempting"))
    if sent.get("complete"):
        run["exit_code"] = sent.get("exitcode")


@contextlib.contextmanager
def serving(*, refuses: bool = False) -> Iterator[WandbServer]:
    """A server that answers, until the end of the `with`."""
    server = WandbServer(refuses)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def mute() -> Iterator[str]:
    """The URL of a server whose kernel accepts each connection and which never answers one."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
