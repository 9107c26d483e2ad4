"""What is pinned: the versions that rendered manifests ask for, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """Releases that go together.

    Attributes:
        ray: of the image that `cluster.image` names; the operator is told.
        kuberay: the operator whose schemas and rules are followed.
        mlflow: of the server.
        postgres: of MLflow's database.
    """

    ray: str
    kuberay: str
    mlflow: str
    postgres: str

    @property
    def mlflow_image(self) -> str:
        """MLflow's own image with database drivers and object stores."""
        return f"ghcr.io/mlflow/mlflow:v{self.mlflow}-full"

    @property
    def postgres_image(self) -> str:
        """PostgreSQL's own image."""
        return f"docker.io/library/postgres:{self.postgres}"


VERSIONS = Versions(ray="2.60.0", kuberay="1.7.0", mlflow="3.17.2", postgres="17.6-bookworm")


def mirrored(image: str, registry: str | None) -> str:
    """Return a public image's name under a mirror: its host is replaced, its path and tag stay."""
    if registry is None:
        return image
    return f"{registry}/{image.partition('/')[2]}"
