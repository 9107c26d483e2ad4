"""The schema of what stands around a stream's cluster: schedule, storage, MLflow, Redis, network.

Secrets are named, never held: a field gives the Secret and the key in it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipelines.cluster_values import (
    Cidr,
    Cron,
    DnsLabel,
    Host,
    Image,
    KeyOfSecret,
    Quantity,
    ResourceName,
    TimeZone,
    WebAddress,
)
from pipelines.section import Section, execution

# The address at which clouds hand out a node's credentials to whoever asks.
_METADATA = "169.254.169.254/32"


class SecretKey(Section):
    """A value in a Secret that already exists in the namespace."""

    name: ResourceName = execution(...)
    """Of the Secret."""
    key: KeyOfSecret = execution(...)
    """In it."""


class ScheduleConfig(Section):
    """When the stream is run again. A run that has nothing to do ends at once."""

    cron: Cron = execution(...)
    """Five fields: minute, hour, day of month, month, day of week; `0 3 * * 1` is Mondays at 3:00."""
    time_zone: TimeZone = execution("Etc/UTC")
    """In which the fields are meant."""
    kind: Literal["CronJob", "RayCronJob"] = execution("CronJob")
    """`CronJob` creates a RayJob unless one of the stream is under way. `RayCronJob` needs the operator's
    feature gate of that name, which is off by default, and does not look whether one is under way."""
    suspend: bool = execution(False)
    """Create the schedule, and let it rest."""
    starting_deadline: int = execution(3600, ge=10)
    """Seconds that a CronJob may start late, after the control plane was away; then it waits for the next."""
    history: int = execution(3, ge=0)
    """Finished Jobs of a CronJob that are kept, and RayJobs that it has created, of each outcome."""


class ClaimConfig(Section):
    """A persistent volume claim that all pods mount at `cluster.folder`."""

    name: ResourceName | None = execution(None)
    """Of one that exists; null makes one."""
    size: Quantity | None = execution(None)
    """Of the one that is made, such as 500Gi."""
    storage_class: ResourceName | None = execution(None)
    """Of the one that is made; null is the cluster's default."""
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] = execution("ReadWriteMany")
    """Of the one that is made. ReadWriteOnce suits a cluster of one node alone."""

    @model_validator(mode="after")
    def _made_or_found(self) -> ClaimConfig:
        if (self.name is None) == (self.size is None):
            found = "neither is" if self.name is None else "both are"
            raise ValueError(
                f"a claim has a name (it exists) or a size (it is made), and {found} given; set one of them"
            )
        return self


class ObjectStoreConfig(Section):
    """How pods reach the object store that `storage` names. Null secrets mean the pods' own identity."""

    access_key: SecretKey | None = execution(None)
    """Of S3: becomes AWS_ACCESS_KEY_ID."""
    secret_key: SecretKey | None = execution(None)
    """Of S3: becomes AWS_SECRET_ACCESS_KEY."""
    service_account_file: SecretKey | None = execution(None)
    """Of Google Cloud Storage: a JSON key file, mounted as GOOGLE_APPLICATION_CREDENTIALS."""
    region: str | None = execution(None, min_length=1)
    """Of S3: becomes AWS_REGION."""
    endpoint: WebAddress | None = execution(None)
    """Of a store that speaks S3, such as MinIO: becomes AWS_ENDPOINT_URL."""

    @model_validator(mode="after")
    def _pair(self) -> ObjectStoreConfig:
        if (self.access_key is None) != (self.secret_key is None):
            missing = "access_key" if self.access_key is None else "secret_key"
            raise ValueError(f"{missing} is missing; an S3 store needs both keys, or neither")
        return self


class StorageConfig(Section):
    """Where artifacts, models and data lie for the pods."""

    claim: ClaimConfig | None = execution(None)
    """A volume that all pods share."""
    object_store: ObjectStoreConfig = ObjectStoreConfig()
    """For a `storage` at s3:// or gs://."""


class PostgresConfig(Section):
    """MLflow's database, one pod with a volume of its own."""

    password: SecretKey = execution(...)
    """Of the database's user `mlflow`."""
    size: Quantity = execution("20Gi")
    """Of its volume."""
    storage_class: ResourceName | None = execution(None)
    """Of its volume; null is the cluster's default."""


class MlflowServerConfig(Section):
    """An MLflow server beside the cluster, with its database and its artifacts."""

    image: Image | None = execution(None)
    """With mlflow and psycopg2; null is MLflow's own, the one with everything in it."""
    hosts: tuple[Host, ...] = execution(())
    """Names under which people open it from outside, such as mlflow.example.com; others are refused."""
    cpu: Quantity = execution("1")
    """Of its pod."""
    memory: Quantity = execution("4Gi")
    """Of its pod."""
    postgres: PostgresConfig = execution(...)
    """The database."""
    artifacts: str | None = execution(None, pattern=r"^(s3|gs)://[^@]+$")
    """Bucket and prefix of its artifacts; null is a volume."""
    artifacts_size: Quantity = execution("20Gi")
    """Of that volume."""
    storage_class: ResourceName | None = execution(None)
    """Of that volume; null is the cluster's default."""


class MlflowConfig(Section):
    """The MLflow server that runs on the cluster write to, instead of `tracking.uri`."""

    uri: WebAddress | None = execution(None)
    """Of one that exists. Its credentials go into `secret_env`, as MLFLOW_TRACKING_TOKEN."""
    deploy: MlflowServerConfig | None = execution(None)
    """Render one beside the cluster."""

    @model_validator(mode="after")
    def _one_of_two(self) -> MlflowConfig:
        if (self.uri is None) == (self.deploy is None):
            found = "neither is" if self.uri is None else "both are"
            raise ValueError(
                f"MLflow exists (uri) or is rendered (deploy), and {found} given; set one of them"
            )
        return self


class RedisConfig(Section):
    """A Redis outside the cluster that holds Ray's control state, so that a head may come back."""

    address: str = execution(..., pattern=r"^(rediss?://)?[A-Za-z0-9.-]+:\d{1,5}$")
    """Host and port, such as redis.platform:6379; `rediss://` in front encrypts."""
    username: SecretKey | None = execution(None)
    """Null sends none."""
    password: SecretKey | None = execution(None)
    """Null sends none."""


class EgressConfig(Section):
    """Addresses outside the cluster that pods may connect to."""

    cidr: Cidr = execution(...)
    """A range of addresses."""
    without: tuple[Cidr, ...] = execution(())
    """Ranges inside it that they may not."""
    ports: tuple[int, ...] = execution((443,), min_length=1)
    """TCP ports."""

    @field_validator("ports")
    @classmethod
    def _are_ports(cls, ports: tuple[int, ...]) -> tuple[int, ...]:
        for port in ports:
            if not 0 < port < 65536:
                raise ValueError(f"{port} is no TCP port; ports go from 1 to 65535")
        return ports


class NetworkConfig(Section):
    """What the NetworkPolicy allows beside what Ray needs within the cluster."""

    operator_namespace: DnsLabel | None = execution(None)
    """Where the KubeRay operator runs; null lets its pods in from any namespace."""
    monitoring_namespace: DnsLabel | None = execution("monitoring")
    """Where Prometheus runs; null lets nobody scrape."""
    client_namespaces: tuple[DnsLabel, ...] = execution(())
    """From where people may open the dashboard and MLflow."""
    egress: tuple[EgressConfig, ...] = Field(
        default=(EgressConfig(cidr="0.0.0.0/0", without=(_METADATA,)),),
        json_schema_extra={"execution": True},
    )
    """Replaces the default, which is HTTPS to everywhere but the cloud's metadata server."""
