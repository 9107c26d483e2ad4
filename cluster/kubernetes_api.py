"""One namespace of a Kubernetes cluster: objects applied, read, watched and deleted, logs of pods.

A thin layer over the official client: it finds out what kinds the cluster knows, writes with server-side
apply so that nobody's fields are taken over unasked, follows an object over watches that end, and turns
what the API server answers into errors that say what to do. Objects are plain mappings, as in YAML.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.kubernetes_errors import KubernetesError, UnknownKind, no_answer, told, unknown
from seekr.errors import ConfigError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient
    from kubernetes.dynamic import DynamicClient
    from kubernetes.dynamic.resource import Resource

MANAGER = "seekr"
"""As whom server-side apply owns fields."""
Object = dict[str, Any]
# Seconds to connect, and to hear something; a watch says nothing for as long as nothing changes.
_TIMEOUT = (10.0, 60.0)
_PASSING = (429, 500, 502, 503, 504)
# A log says nothing for as long as its program is silent.
_SILENCE = 300.0
_PAUSE = 2.0


@dataclass(slots=True, kw_only=True)
class Kubernetes:
    """A namespace.

    Args:
        api: the connection.
        namespace: in which everything is.
        patience: seconds that the API server may be away while something is followed.
    """

    api: ApiClient
    namespace: str
    patience: float = 300.0
    _dynamic: DynamicClient | None = None

    @property
    def host(self) -> str:
        """The API server's address."""
        return self.api.configuration.host

    def knows(self, kind: str) -> bool:
        """Whether the cluster has objects of a kind."""
        try:
            self._resource(kind)
        except UnknownKind:
            return False
        return True

    def get(self, kind: str, name: str, version: str = "") -> Object | None:
        """Return an object, None if there is none of the name."""
        try:
            return self._call("get", kind, version, name=name)
        except KubernetesError as error:
            if error.status == 404:
                return None
            raise

    def select(self, kind: str, selector: str) -> list[Object]:
        """Return the objects that labels select, oldest first."""
        found = self._call("get", kind, label_selector=selector)["items"]
        return sorted(found, key=lambda item: item["metadata"].get("creationTimestamp") or "")

    def apply(self, manifest: Object, *, force: bool = False) -> Literal["unchanged", "applied"]:
        """Bring an object to what a manifest says; fields that it does not name stay.

        What is so already is not written, so that whoever may only read can go on too.

        Raises:
            KubernetesError: a field belongs to another manager (unless forced), or it is refused.
        """
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        version = manifest["apiVersion"]
        try:
            if (live := self.get(kind, name, version)) is not None and _within(manifest, live):
                return "unchanged"
        except KubernetesError as error:
            if error.status != 403:
                raise
        options: dict[str, Any] = {"field_manager": MANAGER, "force_conflicts": force}
        options |= _strict()
        self._call("server_side_apply", kind, version, body=manifest, name=name, **options)
        return "applied"

    def create(self, manifest: Object, *, dry: bool = False) -> Object:
        """Make a new object; `dry` only asks whether it would be taken.

        Raises:
            KubernetesError: with status 409 if there is one of the name.
        """
        rehearsal: dict[str, Any] = {"dry_run": "All"} if dry else {}
        options = rehearsal | {"field_manager": MANAGER} | _strict()
        return self._call(
            "create", manifest["kind"], manifest["apiVersion"], body=manifest, **options
        )

    def merge(self, kind: str, name: str, patch: Mapping[str, Any]) -> Object:
        """Change single fields of an object."""
        options = {"content_type": "application/merge-patch+json", "field_manager": MANAGER}
        return self._call("patch", kind, name=name, body=dict(patch), **options)

    def delete(self, kind: str, name: str, propagation: str = "Background") -> bool:
        """Delete an object; returns whether there was one."""
        try:
            self._call("delete", kind, name=name, propagation_policy=propagation)
        except KubernetesError as error:
            if error.status == 404:
                return False
            raise
        return True

    def watch(self, kind: str, name: str, *, every: float = 30.0) -> Iterator[Object | None]:
        """Yield an object as it is, then whenever it changes, at least once in `every` seconds.

        Ends after None, when it is gone. A watch that the server ends, or whose beginning it has
        forgotten (410), is begun anew from what is there.

        Raises:
            KubernetesError: the API server was away for longer than the patience.
        """
        away = 0.0
        while True:
            try:
                found = self.get(kind, name)
                yield found
                if found is None:
                    return
                version = found["metadata"]["resourceVersion"]
                for event in self._events(kind, name, version, every):
                    away = 0.0
                    yield event["raw_object"] if event["type"] != "DELETED" else None
                    if event["type"] == "DELETED":
                        return
                away = 0.0
            except KubernetesError as error:
                if error.status == 410:
                    continue
                if error.status not in (0, *_PASSING):
                    raise
                away = away or time.monotonic()
                if time.monotonic() - away > self.patience:
                    raise
                time.sleep(_PAUSE)

    def stream(self, path: str, query: Mapping[str, Any]) -> Iterator[str]:
        """Yield the lines of an answer as they come; ends when the server ends it."""
        from kubernetes.watch.watch import iter_resp_lines

        with self._answers(f"read {path}"):
            request = self.api.param_serialize(
                "GET",
                path,
                query_params=list(query.items()),
                header_params={"Accept": "*/*"},
                auth_settings=["BearerToken"],
            )
            response = self.api.call_api(*request, _request_timeout=(_TIMEOUT[0], _SILENCE))
            if response.status != 200:
                response.read()
                self.api.response_deserialize(response, {})
            try:
                yield from iter_resp_lines(response.response)
            finally:
                response.response.close()

    def execute(self, pod: str, container: str, command: Sequence[str]) -> tuple[int, str]:
        """Run a command in a container that runs; returns its exit code and what it said."""
        from kubernetes.client import CoreV1Api
        from kubernetes.stream import stream

        with self._answers(f"run {command[-1]} in Pod {pod}"):
            session = stream(
                CoreV1Api(self.api).connect_get_namespaced_pod_exec,
                pod,
                self.namespace,
                container=container,
                command=list(command),
                stdin=False,
                stdout=True,
                stderr=True,
                tty=False,
                _preload_content=False,
            )
            session.run_forever(timeout=_TIMEOUT[1])
            if session.is_open():
                session.close()
                raise TimeoutError
            return int(session.returncode), str(session.read_all())

    def _events(self, kind: str, name: str, version: str, seconds: float) -> Iterator[Any]:
        from kubernetes.watch import Watch

        resource = self._resource(kind)
        with self._answers(f"watch {kind} {name}"):
            yield from Watch().stream(
                resource.get,
                namespace=self.namespace,
                field_selector=f"metadata.name={name}",
                resource_version=version,
                timeout_seconds=max(1, round(seconds)),
                serialize=False,
                _request_timeout=(_TIMEOUT[0], seconds + _TIMEOUT[1]),
            )

    def _call(self, verb: str, kind: str, version: str = "", **options: Any) -> Any:
        resource = self._resource(kind, version)
        what = options.get("name") or (options.get("body") or {}).get("metadata", {}).get(
            "name", ""
        )
        with self._answers(f"{verb.replace('server_side_', '')} {kind} {what}".rstrip()):
            response = getattr(resource, verb)(
                namespace=self.namespace, serialize=False, _request_timeout=_TIMEOUT, **options
            )
            return json.loads(response.data)

    def _resource(self, kind: str, version: str = "") -> Resource:
        from kubernetes.dynamic import DynamicClient
        from kubernetes.dynamic.exceptions import ResourceNotFoundError

        with self._answers(f"look up {kind}"):
            if self._dynamic is None:
                # By default what a cluster knows is kept in a shared folder, for ever.
                with tempfile.TemporaryDirectory(prefix="seekr-kubernetes-") as folder:
                    self._dynamic = DynamicClient(self.api, cache_file=f"{folder}/kinds.json")
            try:
                return self._dynamic.resources.get(
                    api_version=version or _VERSIONS[kind], kind=kind
                )
            except ResourceNotFoundError as error:
                raise unknown(kind, self.host) from error

    @contextmanager
    def _answers(self, doing: str) -> Iterator[None]:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            raise told(error, doing, self.host, self.namespace) from error
        except (HTTPError, OSError, ValueError) as error:  # the client's own word for a reset
            raise no_answer(error, doing, self.host) from error


def connect(
    *, namespace: str, context: str | None = None, kubeconfig: Path | None = None
) -> Kubernetes:
    """Return a namespace of the cluster that a kubeconfig names, or of the one that this runs in.

    Raises:
        ConfigError: there is no such file or context, or the package `kubernetes` is missing.
    """
    try:
        import urllib3
        from kubernetes import client, config
    except ImportError as error:
        raise ConfigError(
            "the package kubernetes is not installed; pip install 'seekr-ray[kubernetes]', or submit to a "
            "Ray cluster: --address http://head:8265"
        ) from error

    settings = client.Configuration()
    settings.retries = urllib3.Retry(
        total=4,
        backoff_factor=0.5,
        status_forcelist=_PASSING,
        allowed_methods=None,
        raise_on_status=False,
        read=False,
    )
    inside = "KUBERNETES_SERVICE_HOST" in os.environ
    default = os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())
    known = any(Path(part).is_file() for part in default.split(os.pathsep) if part)
    try:
        if kubeconfig is None and context is None and inside and not known:
            config.load_incluster_config(client_configuration=settings)
        else:
            config.load_kube_config(
                config_file=None if kubeconfig is None else str(kubeconfig),
                context=context,
                client_configuration=settings,
                persist_config=False,
            )
    except (config.ConfigException, OSError) as error:
        raise ConfigError(
            f"no way to a Kubernetes cluster: {error}; give --kubeconfig and --context, set KUBECONFIG, or "
            "submit to a Ray cluster: --address http://head:8265"
        ) from error
    return Kubernetes(api=client.ApiClient(settings), namespace=namespace)


_VERSIONS = {
    **dict.fromkeys(("RayJob", "RayCronJob"), "ray.io/v1"),
    **dict.fromkeys(("Pod", "Secret"), "v1"),
    "CronJob": "batch/v1",
}
"""Of the kinds that are asked for by name alone; a manifest says its own."""


def _strict() -> dict[str, Any]:
    """Let the server refuse fields that it does not know, which it would drop."""
    return {"query_params": [("fieldValidation", "Strict")]}


def _within(wanted: Any, live: Any) -> bool:
    """Whether a live object has all that a manifest says."""
    if isinstance(wanted, Mapping):
        return isinstance(live, Mapping) and all(
            key in live and _within(value, live[key]) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        same_length = isinstance(live, list) and len(live) == len(wanted)
        return same_length and all(map(_within, wanted, live))
    return wanted == live
