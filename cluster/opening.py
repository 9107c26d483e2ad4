"""From a stream's YAML and the words of a command to the cluster that is meant, and what would be submitted.

Everything is looked at before anything is sent: the stream, what would travel, where secrets might hide.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from cluster.submission import Backend, Tell, digest_of
from seekr.errors import ConfigError

if TYPE_CHECKING:
    from cluster.kubernetes_api import Kubernetes
    from cluster.render import Manifests
    from cluster.runtime_env import Luggage
    from pipelines.config import StreamConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Which cluster is meant: a Ray cluster by its address, or else Kubernetes.

    Attributes:
        address: of a Ray dashboard.
        token_secret: Kubernetes Secret with its token.
        context: of the kubeconfig.
        kubeconfig: the file.
    """

    address: str | None = None
    token_secret: str | None = None
    context: str | None = None
    kubeconfig: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A stream, and where its runs are.

    Attributes:
        stream: its name.
        base: what names of runs begin with.
        digest: of what would be submitted; empty where nothing would.
    """

    stream: str
    base: str
    digest: str = ""
    backend: Backend


def open_runs(path: Path, changes: Sequence[str], target: Target, *, tell: Tell) -> Opened:
    """Return a stream's runs on a cluster, to look at and to stop.

    Raises:
        ConfigError: the stream is not valid, or there is no way to the cluster.
    """
    from pipelines.load import load_config

    config = load_config(path, changes)
    if target.address is not None:
        return _on_ray(config, target, tell=tell)
    _check_options(target)
    from cluster.kuberay import KubeRay
    from cluster.names import scene

    found = scene(config)
    kubernetes = _connected(config, target)
    return Opened(
        stream=config.name,
        base=found.name,
        backend=KubeRay(kubernetes=kubernetes, name=found.name),
    )


def open_submission(
    path: Path,
    changes: Sequence[str],
    target: Target,
    *,
    tell: Tell,
    pip: bool = False,
    force: bool = False,
) -> Opened:
    """Return a stream's runs on a cluster, ready to start one.

    Raises:
        ConfigError: the stream cannot be submitted there as it is.
    """
    if target.address is None:
        _check_options(target, pip=pip)
        return _rendered(path, changes, target, force=force)
    from cluster import runtime_env
    from pipelines.load import load_config
    from pipelines.stream_values import local_paths, read_values

    config, values = load_config(path, changes), read_values(path, changes)
    refuse_secrets(values)
    packed = runtime_env.luggage(path, values, local_paths(values))
    pins = tuple(runtime_env.pins()) if pip else ()
    content = {
        "stream": packed.values,
        "files": _digests(packed.files),
        "pip": pins,
        "version": metadata.version("seekr-ray"),
    }
    return _on_ray(config, target, tell=tell, luggage=packed, pip=pins, digest=digest_of(content))


def open_kubernetes(
    path: Path, changes: Sequence[str], target: Target
) -> tuple[Kubernetes, str, Manifests]:
    """Return the stream's namespace, the name of its objects, and what is rendered of it.

    Raises:
        ConfigError: it cannot be rendered, or there is no way to the cluster.
    """
    from cluster.render import read_stream, render

    config, text = read_stream(path, changes)
    manifests = render(config, text)
    return _connected(config, target), str(manifests.ray_job["metadata"]["name"]), manifests


def refuse_secrets(values: Any) -> None:
    """Check that plain values hold no credentials: what is submitted can be read by many.

    Raises:
        ConfigError: naming the field.
    """
    from pipelines.provenance import redact
    from pipelines.stream_values import texts

    for field, text in texts(values):
        if redact(text) != text:
            raise ConfigError(
                f"{field} holds what looks like a credential, and what is submitted can be read by everybody "
                "on the cluster; leave it out, and give it to the cluster's pods or nodes as environment "
                "variables (on Kubernetes: cluster.secret_env)"
            )


def _rendered(path: Path, changes: Sequence[str], target: Target, *, force: bool) -> Opened:
    from cluster.kuberay import KubeRay

    kubernetes, name, manifests = open_kubernetes(path, changes, target)
    streams = [item for item in manifests.of_kind("ConfigMap") if "stream.yaml" in item["data"]]
    content = {"job": manifests.ray_job["spec"], "stream": [item["data"] for item in streams]}
    backend = KubeRay(
        kubernetes=kubernetes,
        name=name,
        job=manifests.ray_job,
        manifests=manifests.base,
        force=force,
    )
    return Opened(stream=name, base=name, digest=digest_of(content), backend=backend)


def _on_ray(
    config: StreamConfig,
    target: Target,
    *,
    tell: Tell,
    luggage: Luggage | None = None,
    pip: tuple[str, ...] = (),
    digest: str = "",
) -> Opened:
    from cluster import tokens
    from cluster.jobs_api import GRACE_SECONDS, RayJobs, check_address

    address, token = check_address(target.address or ""), _token(target)
    if tokens.in_clear(address, token):
        tell(
            f"Ray's token crosses the network in clear text to {address}; use https://, or a port that is "
            "forwarded to this machine"
        )
    backend = RayJobs(
        address=address,
        stream=config.name,
        token=token,
        luggage=luggage,
        pip=pip,
        grace=GRACE_SECONDS if config.cluster is None else config.cluster.job.grace_seconds,
    )
    base = re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")
    return Opened(stream=config.name, base=base, digest=digest, backend=backend)


def _connected(config: StreamConfig, target: Target) -> Kubernetes:
    from cluster.kubernetes_api import connect

    assert config.cluster is not None  # or there would be no manifests and no name
    return connect(
        namespace=config.cluster.namespace, context=target.context, kubeconfig=target.kubeconfig
    )


def _check_options(target: Target, *, pip: bool = False) -> None:
    if pip or target.token_secret is not None:
        option = "--pip" if pip else "--token-secret"
        raise ConfigError(
            f"{option} goes with --address, for an existing Ray cluster; on Kubernetes the image has the "
            "packages, and cluster.token_secret names the token"
        )


def _token(target: Target) -> SecretStr | None:
    from cluster import tokens
    from cluster.kubernetes_api import connect
    from seekr.errors import SeekrError

    if target.token_secret is None:
        return tokens.token_of(os.environ)
    namespace, _, name = target.token_secret.rpartition("/")
    kubernetes = connect(
        namespace=namespace or "default", context=target.context, kubeconfig=target.kubeconfig
    )
    secret = kubernetes.get("Secret", name)
    if secret is None:
        raise SeekrError(
            f"--token-secret: there is no Secret {name} in namespace {kubernetes.namespace}; write "
            "NAMESPACE/NAME"
        )
    return tokens.token_in(secret)


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
