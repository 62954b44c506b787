"""W&B's GraphQL fields, as far as the client asks for them, over a `Backend`.

An object is a mapping from field names to values or functions (see `graphql`). A field that is not
here is an error, as with the real server, so that tests notice what the client has come to need.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from . import backend
from .backend import ENTITY, Backend, ServerArtifact, ServerFile, ServerRun, node_id
from .graphql import GraphqlError

Node = dict[str, Any]


class Schema:
    """The roots of queries and mutations.

    Args:
        url: Where this server is, for the addresses of files.
    """

    def __init__(self, state: Backend, url: Callable[[], str]) -> None:
        self._state = state
        self._url = url

    def root(self, kind: str) -> Node:
        """The fields of a query or a mutation."""
        return self._mutation() if kind == "mutation" else self._query()

    # --- queries ---------------------------------------------------------------------------

    def _query(self) -> Node:
        return {
            "__typename": "Query",
            "viewer": _VIEWER,
            "serverInfo": _SERVER_INFO,
            "entity": lambda name: {"id": "e", "name": name, "organization": None, "user": None},
            "project": self._project,
            "model": self._project,
            "artifact": lambda id: self._artifact(self._state.artifact(id)),
            "artifactCollection": self._collection_by_id,
        }

    def _project(self, name: str | None = None, entityName: str | None = None) -> Node | None:
        runs = [run for run in self._state.runs.values() if run.project == name]
        artifacts = [artifact for artifact in self._state.artifacts if artifact.project == name]
        if name is None or entityName not in (None, "", ENTITY) or not (runs or artifacts):
            return None
        named = {run.name: run for run in runs}

        def page(filters: Any = None, order: Any = None, after: Any = None, first: int = 50) -> Node:
            return _page([self._run(run) for run in _ordered(_filtered(runs, filters), order)], after, first)

        def artifact_type(name: str) -> Node | None:
            return self._type(name, [artifact for artifact in artifacts if artifact.type == name])

        return {
            **_project_info(name),
            "readOnly": False,
            "bucket": lambda name, missingOk=False: self._run(named.get(name)),
            "run": lambda name: self._run(named.get(name)),
            "runs": page,
            "runCount": lambda filters=None: len(_filtered(runs, filters)),
            "artifactType": artifact_type,
            "artifactCollection": lambda name: self._collection(name, artifacts),
            "artifactCollectionMembership": lambda name: self._member(artifacts, *_split(name)),
            "artifact": lambda name: self._artifact(self._find(artifacts, *_split(name))),
        }

    def _run(self, run: ServerRun | None) -> Node | None:
        if run is None:
            return None
        made = [a for a in self._state.artifacts if a.run == run.name and a.state == "COMMITTED"]
        used = [a for a in self._state.artifacts if run.name in a.used_by and a.state == "COMMITTED"]
        files = [file for file in run.files.values() if file.is_there]

        def page_of_files(
            names: Sequence[str] = (), after: Any = None, first: int = 50, pattern: str | None = None
        ) -> Node:
            wanted = [file for file in files if not names or file.name in names]
            like = re.compile(".*".join(map(re.escape, (pattern or "%").split("%"))) + r"\Z", re.DOTALL)
            return _page([self._file(file) for file in wanted if like.match(file.name)], after, first)

        return {
            "__typename": "Run",
            "id": run.id,
            "name": run.name,
            "displayName": run.display_name,
            "description": run.notes,
            "notes": run.notes,
            "tags": run.tags,
            "group": run.group or None,
            "jobType": run.job_type or None,
            "state": run.state,
            "stopped": False,
            "commit": None,
            "readOnly": False,
            "sweepName": None,
            "createdAt": run.created_at,
            "heartbeatAt": run.created_at,
            "user": {"name": ENTITY, "username": ENTITY},
            "project": _project_info(run.project),
            "projectId": "1",
            "config": json.dumps(run.config),
            # A run "exists" for a resume only if this has the key "t".
            "wandbConfig": lambda keys: json.dumps(
                {key: value for key, value in _internal_config(run).items() if key in keys}
            ),
            "summaryMetrics": json.dumps(run.summary),
            "systemMetrics": "{}",
            "historyLineCount": len(run.history),
            "eventsLineCount": run.num_lines.get(backend.EVENTS, 0),
            "logLineCount": run.num_lines.get(backend.OUTPUT, 0),
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": "[]",
            "historyKeys": {"lastStep": run.steps[-1] if run.history else -1, "sets": [], "keys": {}},
            "history": lambda minStep=0, maxStep=2**53, samples=500: [
                json.dumps(row) for row in _between(run, minStep, maxStep - 1)[:samples]
            ],
            "events": lambda samples=500: [],
            "sampledHistory": lambda specs: [_sampled(run, json.loads(spec)) for spec in specs],
            "parquetHistory": lambda liveKeys: {
                "parquetUrls": [],
                "liveData": [{"_step": step} for step in run.steps[:1]],
            },
            "fileCount": len(files),
            "files": page_of_files,
            "outputArtifacts": lambda after=None, first=50: _page(
                [self._artifact(artifact) for artifact in made], after, first
            ),
            "inputArtifacts": lambda after=None, first=50: _page(
                [self._artifact(artifact) for artifact in used], after, first
            ),
        }

    def _file(self, file: ServerFile) -> Node:
        address = f"{self._url()}/storage/{file.token}"
        return {
            "__typename": "File",
            "id": file.token,
            "name": file.name,
            "displayName": file.name,
            "url": lambda upload=False: address,
            "directUrl": address,
            "uploadUrl": address,
            "uploadHeaders": [f"Content-MD5:{file.expected_md5}"] if file.expected_md5 else [],
            "sizeBytes": file.size_bytes,
            "storagePath": file.token,
            "mimetype": "application/octet-stream",
            "updatedAt": None,
            "md5": file.md5,
            "digest": file.md5,
        }

    # --- artifacts -------------------------------------------------------------------------

    def _type(self, name: str, artifacts: list[ServerArtifact]) -> Node | None:
        if not artifacts:
            return None
        return {
            "__typename": "ArtifactType",
            "id": node_id("ArtifactType", name),
            "name": name,
            "description": None,
            "createdAt": artifacts[0].created_at,
            "artifactCollection": lambda name: self._collection(name, artifacts),
        }

    def _collection_by_id(self, id: str) -> Node | None:
        for artifact in self._state.artifacts:
            if _collection_id(artifact) == id:
                return self._collection(artifact.collection, [artifact])
        return None

    def _collection(self, name: str, artifacts: list[ServerArtifact]) -> Node | None:
        first = next((artifact for artifact in artifacts if artifact.collection == name), None)
        if first is None:
            return None
        versions = self._state.versions(name, first.project)

        def page(after: Any = None, first: int = 50, order: Any = None, filters: Any = None) -> Node:
            page = _page([self._artifact(artifact) for artifact in versions], after, first)
            for edge in page["edges"]:
                edge["version"] = f"v{edge['node']['versionIndex']}"
            return page

        def aliases(after: Any = None, first: int = 1000) -> Node:
            return _page([_alias(a, alias) for a in versions for alias in a.aliases], after, first)

        return {
            **_collection_info(first),
            "id": _collection_id(first),
            "description": None,
            "createdAt": first.created_at,
            "updatedAt": None,
            "defaultArtifactType": {"name": first.type},
            "tags": {"edges": []},
            "artifacts": page,
            "aliases": aliases,
            "latestArtifact": {"id": versions[0].id} if versions else None,
            "artifactMembership": lambda aliasName: self._member([first], name, aliasName),
        }

    def _find(self, artifacts: list[ServerArtifact], name: str, alias: str) -> ServerArtifact | None:
        return self._state.member(name, artifacts[0].project, alias) if artifacts else None

    def _member(self, artifacts: list[ServerArtifact], name: str, alias: str) -> Node | None:
        artifact = self._find(artifacts, name, alias)
        if artifact is None:
            return None
        return {
            "__typename": "ArtifactCollectionMembership",
            "id": node_id("Membership", artifact.number),
            "versionIndex": artifact.index,
            "createdAt": artifact.created_at,
            "aliases": [_alias(artifact, alias) for alias in (artifact.version, *artifact.aliases)],
            "artifactCollection": _collection_info(artifact),
            "artifact": self._artifact(artifact),
            "files": self._files_of(artifact),
        }

    def _files_of(self, artifact: ServerArtifact) -> Callable[..., Node]:
        def page(names: Sequence[str] | None = None, after: Any = None, first: int | None = 50) -> Node:
            nodes = [
                {**self._file(file), "name": path, "displayName": path}
                for path, file in sorted(artifact.files.items())
                if not names or path in names
            ]
            return {**_page(nodes, after, first or 50), "totalCount": len(nodes)}

        return page

    def _artifact(self, artifact: ServerArtifact | None) -> Node | None:
        if artifact is None:
            return None
        return {
            "__typename": "Artifact",
            "id": artifact.id,
            "artifactSequence": {
                **_collection_info(artifact),
                "latestArtifact": next(
                    ({"id": a.id} for a in self._state.versions(artifact.collection, artifact.project)), None
                ),
            },
            "artifactType": {"name": artifact.type},
            "versionIndex": artifact.index,
            "description": artifact.description,
            "metadata": json.dumps(artifact.metadata),
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [{"__typename": "Tag", "id": node_id("Tag", tag), "name": tag} for tag in artifact.tags],
            "historyStep": artifact.history_step,
            "state": artifact.state,
            "size": lambda: artifact.size_bytes,
            "digest": artifact.digest,
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": None,
            "fileCount": lambda: len(artifact.entries),
            "createdAt": artifact.created_at,
            "updatedAt": None,
            "aliases": [_alias(artifact, alias) for alias in artifact.aliases],
            "currentManifest": {"file": self._file(artifact.manifest)} if artifact.manifest else None,
            "files": self._files_of(artifact),
            "createdBy": lambda: self._run(self._state.runs.get(artifact.run or "")),
            "usedBy": lambda: {
                "edges": [{"node": self._run(self._state.runs[name])} for name in artifact.used_by]
            },
            "artifactMemberships": lambda: {
                "edges": [{"node": self._member([artifact], artifact.collection, artifact.version)}]
            },
        }

    # --- mutations -------------------------------------------------------------------------

    def _mutation(self) -> Node:
        return {
            "__typename": "Mutation",
            "upsertBucket": self._upsert_bucket,
            "createRunFiles": self._create_run_files,
            "markRunFilesUploaded": lambda input: {"success": True},
            "deleteRun": self._delete_run,
            "createArtifact": self._create_artifact,
            "createArtifactManifest": self._create_artifact_manifest,
            "createArtifactFiles": self._create_artifact_files,
            "commitArtifact": self._commit_artifact,
            "useArtifact": self._use_artifact,
            "updateArtifact": self._update_artifact,
            "deleteArtifact": self._delete_artifact,
            "addAliases": self._add_aliases,
            "deleteAliases": self._delete_aliases,
        }

    def _upsert_bucket(self, input: Node) -> Node:
        run, is_new = self._state.upsert(input)
        return {"bucket": self._run(run), "inserted": is_new}

    def _create_run_files(self, input: Node) -> Node:
        run = self._state.find_run(input["runName"], input["projectName"])
        if run is None:
            raise GraphqlError(f"run {input['runName']} not found")
        for name in input["files"]:
            if name not in run.files:
                run.files[name] = self._state.new_file(name)
        files = [self._file(run.files[name]) for name in input["files"]]
        return {"runID": run.id, "uploadHeaders": [], "files": files}

    def _delete_run(self, input: Node) -> Node:
        name = next((run.name for run in self._state.runs.values() if run.id == input["id"]), "")
        self._state.runs.pop(name, None)
        return {"clientMutationId": None}

    def _create_artifact(self, input: Node) -> Node:
        if input.get("runName") and self._state.find_run(input["runName"], input["projectName"]) is None:
            raise GraphqlError(f"run {input['runName']} not found")
        return {"artifact": self._artifact(self._state.create_artifact(input))}

    def _create_artifact_manifest(self, input: Node) -> Node:
        artifact = self._wanted(input["artifactID"])
        md5 = input["digest"] or None
        artifact.manifest = self._state.new_file(input["name"], expected_md5=md5)
        node = {"id": node_id("ArtifactManifest", artifact.number), "file": self._file(artifact.manifest)}
        return {"artifactManifest": node}

    def _create_artifact_files(self, input: Node) -> Node:
        edges = []
        for spec in input["artifactFiles"]:
            if spec.get("uploadPartsInput"):
                raise GraphqlError("uploads in parts are not served here")
            artifact = self._wanted(spec["artifactID"])
            file, birth_id = self._state.add_file(artifact, spec["name"], spec["md5"])
            node = {**self._file(file), "uploadMultipartUrls": None, "artifact": {"id": birth_id}}
            if file.is_there:
                node["uploadUrl"] = None
            edges.append({"node": node})
        return {"files": {"edges": edges}}

    def _commit_artifact(self, input: Node) -> Node:
        artifact = self._wanted(input["artifactID"])
        if artifact.state == "PENDING" and (why_not := self._state.commit(artifact)):
            raise GraphqlError(f"artifact cannot be committed: {why_not}")
        return {"artifact": self._artifact(artifact)}

    def _use_artifact(self, input: Node) -> Node:
        artifact = self._wanted(input["artifactID"])
        if input["runName"] not in artifact.used_by:
            artifact.used_by.append(input["runName"])
        return {"artifact": self._artifact(artifact)}

    def _update_artifact(self, input: Node) -> Node:
        artifact = self._wanted(input["artifactID"])
        if input.get("metadata"):
            artifact.metadata = json.loads(input["metadata"])
        if input.get("description") is not None:
            artifact.description = input["description"]
        return {"artifact": self._artifact(artifact)}

    def _delete_artifact(self, input: Node) -> Node:
        artifact = self._wanted(input["artifactID"])
        why_not = self._state.delete_artifact(artifact, with_aliases=bool(input.get("deleteAliases")))
        if why_not:
            raise GraphqlError(why_not)
        return {"artifact": self._artifact(artifact)}

    def _add_aliases(self, input: Node) -> Node:
        artifact = self._wanted(input["artifactID"])
        self._state.set_aliases(artifact, [alias["alias"] for alias in input["aliases"]])
        return {"success": True}

    def _delete_aliases(self, input: Node) -> Node:
        artifact = self._wanted(input["artifactID"])
        gone = {alias["alias"] for alias in input["aliases"]}
        artifact.aliases = [alias for alias in artifact.aliases if alias not in gone]
        return {"success": True}

    def _wanted(self, artifact_id: str) -> ServerArtifact:
        artifact = self._state.artifact(artifact_id)
        if artifact is None:
            raise GraphqlError(f"artifact {artifact_id} not found")
        return artifact


# --- parts of objects ----------------------------------------------------------------------

_VIEWER: Node = {
    "__typename": "User",
    "id": "u",
    "name": ENTITY,
    "username": ENTITY,
    "entity": ENTITY,
    "email": "me@localhost",
    "flags": "{}",
    "admin": False,
    "deletedAt": None,
    "apiKeys": {"edges": []},
    "teams": {"edges": [{"node": {"name": ENTITY}}]},
}
_SERVER_INFO: Node = {
    "__typename": "ServerInfo",
    "features": [],
    "cliVersionInfo": {"max_cli_version": "0.31.0", "min_cli_version": "0.10.0"},
    "latestLocalVersionInfo": None,
}


def _project_info(name: str) -> Node:
    return {
        "__typename": "Project",
        "id": node_id("Project", name),
        "internalId": "1",
        "name": name,
        "entityName": ENTITY,
        "entity": {"id": "e", "name": ENTITY},
    }


def _collection_info(artifact: ServerArtifact) -> Node:
    return {
        "__typename": "ArtifactSequence",
        "name": artifact.collection,
        "project": _project_info(artifact.project),
    }


def _collection_id(artifact: ServerArtifact) -> str:
    return node_id("ArtifactSequence", artifact.project, artifact.collection)


def _alias(artifact: ServerArtifact, alias: str) -> Node:
    return {
        "__typename": "ArtifactAlias",
        "id": node_id("Alias", artifact.number, alias),
        "alias": alias,
        "artifactCollection": _collection_info(artifact),
    }


def _split(name: str) -> tuple[str, str]:
    """(collection, alias) of `collection:alias`."""
    collection, _, alias = name.partition(":")
    return collection, alias or "latest"


def _internal_config(run: ServerRun) -> Node:
    return dict((run.config.get("_wandb") or {}).get("value") or {})


def _page(nodes: list[Any], after: str | None, first: int) -> Node:
    start = int(after) if after else 0
    end = start + first
    edges = [{"node": node, "cursor": str(start + i + 1)} for i, node in enumerate(nodes[start:end])]
    info = {"__typename": "PageInfo", "endCursor": str(start + len(edges)), "hasNextPage": end < len(nodes)}
    return {"edges": edges, "pageInfo": info, "totalCount": len(nodes)}


# --- history -------------------------------------------------------------------------------


def _between(run: ServerRun, first: int, last: int) -> list[Node]:
    return [row for row in run.history if first <= row["_step"] <= last]


def _sampled(run: ServerRun, spec: Node) -> list[Node]:
    keys = list(dict.fromkeys(spec["keys"]))
    rows = _between(run, spec.get("minStep", 0), spec.get("maxStep", 2**53))
    return [{key: row[key] for key in keys} for row in rows if all(key in row for key in keys)][
        : spec["samples"]
    ]


# --- filters of runs, in MongoDB's language ------------------------------------------------

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": operator.eq,
    "$ne": operator.ne,
    "$gt": lambda a, b: a is not None and a > b,
    "$gte": lambda a, b: a is not None and a >= b,
    "$lt": lambda a, b: a is not None and a < b,
    "$lte": lambda a, b: a is not None and a <= b,
    "$in": lambda a, b: any(item in b for item in a) if isinstance(a, list) else a in b,
    "$nin": lambda a, b: a not in b,
    "$exists": lambda a, b: (a is not None) == b,
    "$regex": lambda a, b: isinstance(a, str) and re.search(b, a) is not None,
}


def _filtered(runs: list[ServerRun], filters: str | None) -> list[ServerRun]:
    wanted = json.loads(filters or "{}") or {}
    return [run for run in runs if _matches(run, wanted)]


def _matches(run: ServerRun, wanted: Node) -> bool:
    for key, condition in wanted.items():
        if key in ("$and", "$or"):
            combine = all if key == "$and" else any
            if not combine(_matches(run, inner) for inner in condition):
                return False
            continue
        tests = condition if isinstance(condition, dict) else {"$eq": condition}
        if not all(_COMPARE[name](_value(run, key), expected) for name, expected in tests.items()):
            return False
    return True


def _value(run: ServerRun, key: str) -> Any:
    plain = {
        "group": run.group,
        "state": run.state,
        "name": run.name,
        "displayName": run.display_name,
        "display_name": run.display_name,
        "tags": run.tags,
        "jobType": run.job_type,
        "createdAt": run.created_at,
        "created_at": run.created_at,
    }
    if key in plain:
        return plain[key]
    root, _, rest = key.partition(".")
    if root not in ("config", "summary_metrics", "summaryMetrics"):
        raise GraphqlError(f"unknown key {key!r} in filters")
    value: Any = run.config if root == "config" else run.summary
    if root == "config":
        name, _, inner = rest.partition(".")
        entry = value.get(name) or {}
        value, rest = entry.get("value"), inner.removeprefix("value").removeprefix(".")
    for part in rest.split(".") if rest else []:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _ordered(runs: list[ServerRun], order: str | None) -> list[ServerRun]:
    key = (order or "+created_at").lstrip("+-")
    is_down = (order or "").startswith("-")
    keyed = [(_value(run, key), run) for run in runs]
    return [
        run for _, run in sorted(keyed, key=lambda pair: (pair[0] is None, pair[0] or 0), reverse=is_down)
    ]
