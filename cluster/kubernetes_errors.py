"""What the API server of Kubernetes answers when it refuses, as errors that say what to do."""

from __future__ import annotations

import json
import re
from typing import Any

from cluster.submission import SubmissionError

_HANDSHAKE = re.compile(r"Handshake status (\d+) ([\w ]+)")


class KubernetesError(SubmissionError):
    """The API server refused, or did not answer.

    Attributes:
        status: of HTTP; 0 where there was no answer.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class UnknownKind(KubernetesError):
    """The cluster has no objects of a kind, as where an operator is missing."""


def unknown(kind: str, host: str) -> UnknownKind:
    """Return what to raise for a kind that a cluster does not know."""
    if kind == "RayCronJob":
        advice = (
            f"the cluster {host} knows no RayCronJob: KubeRay is older than 1.6, or its feature gate "
            "RayCronJob is off; use cluster.schedule.kind: CronJob"
        )
    elif kind.startswith("Ray"):
        advice = (
            f"the cluster {host} knows no {kind}: install the KubeRay operator (1.6 or newer) first"
        )
    else:
        advice = f"the cluster {host} knows no {kind}; it is too old, or not Kubernetes"
    return UnknownKind(advice)


_ADVICE: dict[int, str] = {
    400: "the manifest does not fit this version of KubeRay or Kubernetes; nothing was written",
    401: "log in to the cluster again, or choose another context (--context)",
    403: "ask whoever runs the cluster for that right, or let them apply what `seekr cluster render` writes",
    409: "somebody else owns these fields; take them over with --force, or leave them out of the stream",
    422: "the manifest is refused by the cluster's own rules; nothing was written",
}


def no_answer(error: Exception, doing: str, host: str) -> KubernetesError:
    """Return what to raise where a request was not answered."""
    cause = getattr(error, "reason", None) or error
    return KubernetesError(
        f"the API server {host} does not answer ({type(cause).__name__}, {doing}); is the cluster up, and "
        "is this the right context (--context)?",
        0,
    )


def told(error: Any, doing: str, host: str, namespace: str) -> KubernetesError:
    """Return what to raise for the client's exception.

    Args:
        error: the client's.
        doing: what was asked.
    """
    status, message = int(error.status or 0), _message(error)
    # A WebSocket that is refused has its status in words alone.
    if not status and (found := _HANDSHAKE.match(message)):
        status, message = int(found[1]), found[2]
    if status == 404 and f'namespaces "{namespace}"' in message:
        advice = (
            f"make the namespace (kubectl create namespace {namespace}), or set cluster.namespace"
        )
    else:
        advice = _ADVICE.get(status, "look at the API server's own state, and try again")
    return KubernetesError(f"{doing} on {host}: {status} {message}; {advice}", status)


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason or "no reason was given")
