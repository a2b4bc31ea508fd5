"""A server on loopback that answers as the Hugging Face Hub does to those who create a repository
and commit to it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

TOKEN = "hf_valid"
LARGE = (".safetensors", ".parquet")


class Hub:
    """Repositories of ``user``; those of others cannot be written.

    Attributes:
        url: Address.
        private: Repository to whether it is private, such as ``models/user/name``.
        commits: Repository to the files of each commit.
        requests: Method and path of every request.
        failing: Paths that are answered with status 500.
        ignored: Files that a ``.gitignore`` of the repositories names.
    """

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.failing: tuple[str, ...] = ()
        self.ignored: tuple[str, ...] = ()
        self._blobs: dict[str, bytes] = {}
        kind = "/api/{kind:str}/{user:str}/{name:str}"
        post = {"methods": ["POST"]}
        batch = "{user:str}/{name:str}.git/info/lfs/objects/batch"
        routes = [
            Route("/api/repos/create", self._create, **post),
            Route("/api/validate-yaml", self._validate, **post),
            Route(kind, self._info),
            Route(f"{kind}/preupload/main", self._preupload, **post),
            Route(f"{kind}/commit/main", self._commit, **post),
            Route(f"{kind}/tree/main", self._tree),
            Route(f"/{batch}", self._batch, **post),
            Route(f"/datasets/{batch}", self._batch, **post),
            Route("/blobs/{digest:str}", self._blob, methods=["PUT"]),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), port=0, log_level="critical", ws="none", lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _refusal(self, request: Request) -> Response | None:
        """Return the response that refuses a request before it is read, or None."""
        self.requests.append(f"{request.method} {request.url.path}")
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            message = "Invalid credentials in Authorization header"
            return JSONResponse({"error": message}, 401, {"X-Error-Message": message})
        if any(path in request.url.path for path in self.failing):
            return JSONResponse({"error": "Internal Error"}, 500)
        return None

    async def _create(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        if body["organization"] != "user":
            message = f"You don't have the rights to create under {body['organization']}"
            return JSONResponse({"error": message}, 403, {"X-Error-Message": message})
        kind, repo = f"{body.get('type', 'model')}s", f"{body['organization']}/{body['name']}"
        prefix = "datasets/" if kind == "datasets" else ""
        url = {"url": f"{self.url}/{prefix}{repo}"}
        if f"{kind}/{repo}" in self.private:
            return JSONResponse({"error": "You already created this repo"} | url, 409)
        self.private[f"{kind}/{repo}"] = body["visibility"] == "private"
        return JSONResponse(url)

    async def _validate(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        content = (await request.json())["content"]
        if "license: unheard-of" in content:
            error = {"message": '"license" must be one of a list'}
            return JSONResponse({"errors": [error], "warnings": []}, 400)
        return JSONResponse({"errors": [], "warnings": []})

    def _place(self, request: Request) -> str:
        return "{kind}/{user}/{name}".format(**request.path_params)

    async def _info(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        place = self._place(request)
        if place not in self.private:
            return JSONResponse({"error": "Repository not found"}, 404)
        _, _, repo = place.partition("/")
        return JSONResponse(
            {"id": repo, "private": self.private[place], "sha": "0" * 40, "tags": []}
        )

    async def _preupload(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": file["path"] in self.ignored,
            }
            for file in (await request.json())["files"]
        ]
        return JSONResponse({"files": files})

    async def _tree(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        commits = self.commits.get(self._place(request), [])
        files = {name: content for commit in commits for name, content in commit.items()}
        return JSONResponse(
            [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in files.items()
            ]
        )

    async def _batch(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        objects = [
            one | {"actions": {"upload": {"href": f"{self.url}/blobs/{one['oid']}"}}}
            for one in (await request.json())["objects"]
        ]
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def _blob(self, request: Request) -> Response:
        content = await request.body()
        assert hashlib.sha256(content).hexdigest() == request.path_params["digest"]
        self._blobs[request.path_params["digest"]] = content
        return Response()

    async def _commit(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        files: dict[str, bytes] = {}
        for line in (await request.body()).decode().splitlines():
            entry: dict[str, Any] = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self._blobs[value["oid"]]
        place = self._place(request)
        self.commits.setdefault(place, []).append(files)
        return JSONResponse({"commitUrl": f"{self.url}/{place}/commit/1", "commitOid": "1" * 40})
