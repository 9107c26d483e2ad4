"""An MLflow server beside the cluster: one pod that serves, one PostgreSQL, and a place for artifacts.

The database's password is in a Secret and in no address: libpq takes it from the environment. The server
answers only to the names of its Service, which MLflow checks against DNS rebinding.
"""

from __future__ import annotations

from typing import Any

from cluster.names import DATABASE, MLFLOW, Scene
from cluster.network import DATABASE_PORT, MLFLOW_PORT
from cluster.pods import (
    CONTAINER_SECURITY,
    common_spec,
    environment,
    key_volume,
    resources,
    scratch,
    store_secrets,
    store_values,
)
from cluster.storage import claim_of, claim_spec
from cluster.versions import VERSIONS, mirrored
from pipelines.cluster_services import MlflowServerConfig

_USER = "mlflow"
# Of the image's own user; others may not read the files that it makes.
_POSTGRES_USER = 999
_ARTIFACTS = "/artifacts"
_DATA = "/var/lib/postgresql/data"
_PASSWORD = "/var/run/secrets/postgres"


def tracking_uri(scene: Scene) -> str | None:
    """Return where runs on the cluster track; None leaves it to the stream."""
    mlflow = scene.cluster.mlflow
    if mlflow is None:
        return None
    return mlflow.uri or f"http://{scene.host('mlflow')}:{MLFLOW_PORT}"


def mlflow_server(scene: Scene) -> list[dict[str, Any]]:
    """Return the server, its database and their volumes; nothing where none is to be rendered."""
    mlflow = scene.cluster.mlflow
    if mlflow is None or mlflow.deploy is None:
        return []
    server = mlflow.deploy
    found = [
        _service(scene, "mlflow", MLFLOW, MLFLOW_PORT, headless=False),
        _deployment(scene, server),
        _service(scene, "mlflow-db", DATABASE, DATABASE_PORT, headless=True),
        _database(scene, server),
    ]
    if server.artifacts is None:
        found.append(
            claim_of(
                scene,
                "mlflow-artifacts",
                MLFLOW,
                size=server.artifacts_size,
                storage_class=server.storage_class,
                mode="ReadWriteOnce",
            )
        )
    return found


def _service(
    scene: Scene, part: str, component: str, port: int, *, headless: bool
) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "selector": {key: scene.labels(component)[key] for key in sorted(scene.labels(component))},
        "ports": [{"name": component, "port": port, "targetPort": port}],
    }
    if headless:
        spec["clusterIP"] = "None"
    return scene.object("v1", "Service", part, component, spec=spec)


def _deployment(scene: Scene, server: MlflowServerConfig) -> dict[str, Any]:
    volumes, mounts = scratch("2Gi", "/tmp")
    key_volumes, key_mounts = key_volume(scene) if server.artifacts is not None else ([], [])
    if server.artifacts is None:
        claim = {"claimName": scene.called("mlflow-artifacts")}
        volumes.append({"name": "artifacts", "persistentVolumeClaim": claim})
        mounts.append({"name": "artifacts", "mountPath": _ARTIFACTS})
    container = {
        "name": MLFLOW,
        "image": server.image or mirrored(VERSIONS.mlflow_image, scene.cluster.registry),
        "imagePullPolicy": "IfNotPresent",
        "command": ["mlflow", "server"],
        "args": _arguments(scene, server),
        "workingDir": "/tmp",
        "env": _server_environment(scene, server),
        "ports": [{"name": "http", "containerPort": MLFLOW_PORT}],
        "startupProbe": _probe(failures=60),
        "readinessProbe": _probe(failures=3),
        "livenessProbe": _probe(failures=6),
        "resources": resources(cpu=server.cpu, memory=server.memory),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": mounts + key_mounts,
    }
    spec = common_spec(scene, user=scene.cluster.user, account=scene.called("mlflow"))
    spec |= {"containers": [container], "volumes": volumes + key_volumes}
    return scene.object(
        "apps/v1",
        "Deployment",
        "mlflow",
        MLFLOW,
        spec={
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # its volume goes to one pod at a time
            "selector": {"matchLabels": scene.labels(MLFLOW)},
            "template": {"metadata": {"labels": scene.labels(MLFLOW)}, "spec": spec},
        },
    )


def _arguments(scene: Scene, server: MlflowServerConfig) -> list[str]:
    database = f"{scene.called('mlflow-db')}:{DATABASE_PORT}/{_USER}"
    hosts = [scene.called("mlflow"), scene.host("mlflow"), f"{scene.host('mlflow')}.cluster.local"]
    allowed = [f"{host}:{MLFLOW_PORT}" for host in hosts] + ["localhost:*", "127.0.0.1:*"]
    allowed += server.hosts
    return [
        "--host=0.0.0.0",
        f"--port={MLFLOW_PORT}",
        "--workers=2",
        f"--backend-store-uri=postgresql+psycopg2://{_USER}@{database}",
        f"--artifacts-destination={server.artifacts or _ARTIFACTS}",
        f"--allowed-hosts={','.join(allowed)}",
    ]


def _server_environment(scene: Scene, server: MlflowServerConfig) -> list[dict[str, Any]]:
    values = {"HOME": "/tmp", "MLFLOW_DISABLE_TELEMETRY": "true"}
    secrets = {"PGPASSWORD": server.postgres.password}
    if server.artifacts is not None:
        values |= store_values(scene)
        endpoint = scene.cluster.storage.object_store.endpoint
        values |= {} if endpoint is None else {"MLFLOW_S3_ENDPOINT_URL": endpoint}
        secrets |= store_secrets(scene)
        if scene.cluster.storage.object_store.service_account_file is not None:
            _, mounts = key_volume(scene)
            values["GOOGLE_APPLICATION_CREDENTIALS"] = f"{mounts[0]['mountPath']}/key.json"
    return environment(values, secrets)


def _probe(*, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": "/health", "port": MLFLOW_PORT},
        "periodSeconds": 5,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _database(scene: Scene, server: MlflowServerConfig) -> dict[str, Any]:
    postgres = server.postgres
    volumes, mounts = scratch("1Gi", "/tmp", "/var/run/postgresql")
    items = [{"key": postgres.password.key, "path": "password"}]
    secret = {"secretName": postgres.password.name, "items": items, "defaultMode": 0o440}
    volumes += [
        {"name": "password", "secret": secret},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "256Mi"}},
    ]
    mounts += [
        {"name": "password", "mountPath": _PASSWORD, "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "data", "mountPath": _DATA},
    ]
    ready = {"exec": {"command": ["pg_isready", "-U", _USER, "-d", _USER]}, "periodSeconds": 10}
    container = {
        "name": DATABASE,
        "image": mirrored(VERSIONS.postgres_image, scene.cluster.registry),
        "imagePullPolicy": "IfNotPresent",
        "env": environment(
            {
                "POSTGRES_USER": _USER,
                "POSTGRES_DB": _USER,
                "POSTGRES_PASSWORD_FILE": f"{_PASSWORD}/password",
                "POSTGRES_INITDB_ARGS": "--auth-host=scram-sha-256 --data-checksums",
                # Below the volume, whose root may hold lost+found.
                "PGDATA": f"{_DATA}/pgdata",
            },
            {},
        ),
        "ports": [{"name": "postgres", "containerPort": DATABASE_PORT}],
        "startupProbe": ready | {"failureThreshold": 30},
        "readinessProbe": ready | {"timeoutSeconds": 5},
        "livenessProbe": ready | {"timeoutSeconds": 5, "failureThreshold": 6},
        "resources": resources(cpu="1", memory="2Gi"),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": mounts,
    }
    spec = common_spec(scene, user=_POSTGRES_USER, account=scene.called("mlflow-db"))
    spec |= {
        "terminationGracePeriodSeconds": 60,
        "containers": [container],
        "volumes": volumes,
    }
    claim = claim_spec(
        size=postgres.size, storage_class=postgres.storage_class, mode="ReadWriteOnce"
    )
    return scene.object(
        "apps/v1",
        "StatefulSet",
        "mlflow-db",
        DATABASE,
        spec={
            "replicas": 1,
            "serviceName": scene.called("mlflow-db"),
            "selector": {"matchLabels": scene.labels(DATABASE)},
            "template": {"metadata": {"labels": scene.labels(DATABASE)}, "spec": spec},
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": claim}],
        },
    )
