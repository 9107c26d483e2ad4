"""KubeRay manifests, submission and schedules. Imports `pipelines.config` only, so it needs no Ray."""
