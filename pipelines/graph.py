"""From a stream to its stages: the one place that knows what follows from what.

The graph is pure: it reads the config and the digests of the outside world and returns stage
descriptions in an order that respects their inputs. What a method does not need is not there; what
two methods have in common (ingest, the first task's training) has the same fingerprint in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

from pipelines import graph_documents as documents
from pipelines.config import StreamConfig
from pipelines.data_config import TaskConfig
from pipelines.labels import ALL_TASKS, BASE, REVIEW, before, borrowed, foretold, retaught
from pipelines.stage import Stage
from pipelines.stage_kinds import stage_of
from pipelines.stage_settings import (
    answering,
    borrowing,
    decoding,
    everything,
    generating,
    measuring,
    reading,
    replay_targets,
    scoring,
    targets,
    training,
)
from pipelines.survey import Facts
from seekr.methods.ewc import EWC, FISHER
from seekr.methods.sapt import SAPT
from seekr.methods.seekr import SEEKR


def build_graph(config: StreamConfig, facts: Facts) -> tuple[Stage, ...]:
    """Return the stream's stages; each comes after all of its inputs."""
    return tuple(chain.from_iterable(graph_by_task([config] * len(config.tasks), facts)))


def graph_by_task(configs: Sequence[StreamConfig], facts: Facts) -> tuple[tuple[Stage, ...], ...]:
    """Return the stages that each task makes necessary; all at once where all tasks are learnt at once.

    Args:
        configs: one per task, the same but for settings: what holds while that task is learnt.
    """
    builder = _Builder(configs[0], facts)
    builder.general(BASE)
    builder.outside()
    ends = [0]
    if configs[0].method.needs.all_tasks:
        builder.joint()
        ends.append(len(builder.stages))
    else:
        for index, config in enumerate(configs):
            builder.task(index, config)
            ends.append(len(builder.stages))
    return tuple(tuple(builder.stages[begin:end]) for begin, end in pairwise(ends))


class _Builder:
    """Adds stages task by task, remembering the newest of each kind per task."""

    def __init__(self, config: StreamConfig, facts: Facts) -> None:
        self._config, self._facts = config, facts
        self._method = config.method
        self._latest: dict[tuple[str, str], Stage] = {}
        self.stages: list[Stage] = []

    def task(self, index: int, config: StreamConfig) -> None:
        """Add what learning task `index` takes, with the settings that hold then."""
        self._config, self._method = config, config.method
        task, needs = self._config.tasks[index], self._method.needs
        known = [other.name for other in self._config.tasks[: index + 1]]
        self._ingest(task)
        self._weigh(task)
        if self._config.evaluate.forward_transfer and index > 0 and self._config.is_tested(task):
            self._evaluate_before(task, known[-2])
        late = self._config.replay.sampling == "surprise_after"
        if needs.replay and self._config.replay.generator is not None:
            self._generate(task)
        elif needs.replay and not late:
            self._sample(task, known[:-1])
        if needs.task_logits and index > 0:
            self._foretell(task, known[-2])
        if needs.replay and self._config.replay.borrowed is not None and index > 0:
            self._borrow(task, known[:-1])
        self._train(task, earlier=known[:-1])
        if needs.replay and late:
            self._sample(task, known)
        if self._on_policy:
            self._roll_out(known)
        if needs.fisher:
            self._fisher(task, earlier=known[:-1])
        if needs.heads:
            self._score(task, earlier=known[:-1])
            self._select(task, known)
        if needs.teacher:
            self._teach(known)
        self._evaluate(task.name, known)
        if self._config.general.after == "every" or len(known) == len(self._config.tasks):
            self.general(task.name)

    def joint(self) -> None:
        """Add one training on all tasks' rows."""
        for task in self._config.tasks:
            self._ingest(task)
            self._weigh(task)
        names = [task.name for task in self._config.tasks]
        inputs = {f"data.{name}": self._latest["ingest", name] for name in names}
        inputs |= self._per_token(names)
        settings = training(self._config, self._config.train.epochs, earlier=False)
        self._add("train", ALL_TASKS, settings, inputs, {"model": self._facts.model_digest})
        self._evaluate(ALL_TASKS, names)
        self.general(ALL_TASKS)

    def general(self, learnt: str) -> None:
        """Add a measurement of general ability, if any is asked for."""
        if not self._config.general.asked:
            return
        settings, own = measuring(self._config, self._facts.harness), self._facts.definitions
        sources = {} if own is None else {"definitions": own}
        if learnt == BASE:
            sources["model"] = self._facts.model_digest
        inputs = {} if learnt == BASE else {"model": self._latest["train", learnt]}
        self._add("general", learnt, settings, inputs, sources)

    def outside(self) -> None:
        """Add what is made before any task: sentences to score, a network that weighs tokens."""
        for stage in documents.probe_stages(self._config, self._facts):
            self._keep(stage)
        if (review := self._config.review) is not None:
            self._ingest(review)
            data = {"data": self._latest["ingest", REVIEW]}
            self._add("sample", REVIEW, everything(self._config), data)
        network = documents.network_stage(self._config, self._facts)
        if network is not None:
            self._keep(network)
        if review is not None:
            self._weigh(review)

    def _weigh(self, task: TaskConfig) -> None:
        """Add what the tokens of a task's rows count, if they do not all count the same."""
        data, network = self._latest["ingest", task.name], self._latest.get(("meta", BASE))
        stage = documents.weights_stage(self._config, self._facts, data, network)
        if stage is not None:
            self._keep(stage)

    def _per_token(self, names: list[str]) -> dict[str, Stage]:
        """Return a training's inputs about single tokens: their weights, and sentences to score."""
        found = {
            f"weights.{name}": self._latest["weights", name]
            for name in names
            if ("weights", name) in self._latest
        }
        scored = {
            f"probes.{item.name}": self._latest["probe", item.name] for item in self._config.probes
        }
        return found | scored

    def _ingest(self, task: TaskConfig) -> None:
        facts = self._facts.tasks[task.name]
        sources = {"train": facts.train.digest, "tokenizer": self._facts.tokenizer_digest}
        if facts.test is not None:
            sources["test"] = facts.test.digest
        self._add("ingest", task.name, reading(self._config, task, facts.template), {}, sources)

    @property
    def _on_policy(self) -> bool:
        needs = self._method.needs
        return needs.replay and (needs.on_policy or self._config.replay.answers == "on_policy")

    def _sample(self, task: TaskConfig, learnt: list[str]) -> None:
        replay, inputs = self._config.replay, {"data": self._latest["ingest", task.name]}
        settings = {"ratio": replay.ratio, "rows": replay.rows, "seed": self._config.seed}
        if replay.sampling == "random":
            self._add("sample", task.name, settings, inputs)
            return
        settings |= {"sampling": "surprise", "dtype": self._config.model.dtype}
        model = self._model("model", learnt)
        sources = {} if model else {"model": self._facts.model_digest}
        self._add("sample", task.name, settings, inputs | model, sources)

    def _generate(self, task: TaskConfig) -> None:
        """Let a generator write prompts like a task's, in place of kept rows."""
        settings = generating(self._config, task, self._facts.tasks[task.name].template)
        inputs = {"data": self._latest["ingest", task.name]}
        sources = {"model": self._facts.model_digest}
        self._add("generate", task.name, settings, inputs, sources)

    def _roll_out(self, known: list[str]) -> None:
        """Let the newest model answer the kept prompts of all tasks, for the next task's replay."""
        newest = known[-1]
        for name in known:
            settings = answering(self._config, name)
            inputs = {
                "model": self._latest["train", newest],
                "replay": self._latest["sample", name],
            }
            label = name if name == newest else retaught(name, newest)
            self._latest["rollout", name] = self._add("rollout", label, settings, inputs)

    def _borrow(self, task: TaskConfig, earlier: list[str]) -> None:
        """Let the newest model answer earlier tasks' questions about the new inputs; and teach."""
        settings = borrowing(self._config, {n: self._facts.tasks[n].template for n in earlier})
        inputs = {f"replay.{name}": self._latest["sample", name] for name in earlier}
        inputs["data"] = self._latest["ingest", task.name]
        self._add("borrow", task.name, settings, inputs | self._model("model", earlier))
        if self._method.needs.teacher:
            teaching = {
                "teacher": self._latest["train", earlier[-1]],
                "replay": self._latest["borrow", task.name],
            }
            teaching |= self._heads(earlier[-1])
            self._add("teach", borrowed(task.name), replay_targets(self._config), teaching)

    def _kept(self, task: str) -> Stage:
        """Return the stage whose rows of an earlier task are replayed."""
        if self._config.replay.generator is not None:
            return self._latest["generate", task]
        return self._latest["rollout" if self._on_policy else "sample", task]

    def _train(self, task: TaskConfig, earlier: list[str]) -> None:
        inputs = {f"data.{task.name}": self._latest["ingest", task.name]}
        reviewed = [REVIEW] if self._config.review is not None else []
        replayed = [*reviewed, *earlier] if self._method.needs.replay else []
        if replayed:
            inputs |= {f"replay.{name}": self._latest["sample", name] for name in reviewed}
            inputs |= {f"replay.{name}": self._kept(name) for name in earlier}
            if self._method.needs.teacher:
                inputs |= {f"targets.{name}": self._latest["teach", name] for name in earlier}
            if ("borrow", task.name) in self._latest:
                label = borrowed(task.name)
                inputs[f"replay.{label}"] = self._latest["borrow", task.name]
                if self._method.needs.teacher:
                    inputs[f"targets.{label}"] = self._latest["teach", label]
        inputs |= self._per_token([task.name, *replayed])
        if self._method.needs.task_logits and earlier:
            inputs[f"task_targets.{task.name}"] = self._latest["teach", task.name]
        if self._method.needs.fisher and earlier:
            inputs[f"past.{FISHER}"] = self._latest["fisher", earlier[-1]]
        if self._method.needs.adapters:
            inputs |= {f"past.{name}": self._latest["train", name] for name in earlier}
        settings = training(
            self._config,
            task.epochs or self._config.train.epochs,
            earlier=bool(earlier or reviewed),
        )
        self._add("train", task.name, settings, inputs | self._model("model", earlier))

    def _model(self, name: str, learnt: list[str]) -> dict[str, Stage]:
        """Return the input that is the model after the tasks learnt, nothing for the base."""
        return {name: self._latest["train", learnt[-1]]} if learnt else {}

    def _fisher(self, task: TaskConfig, earlier: list[str]) -> None:
        assert isinstance(self._method, EWC)
        inputs = {
            "after": self._latest["train", task.name],
            "data": self._latest["ingest", task.name],
        }
        if earlier:
            inputs["earlier"] = self._latest["fisher", earlier[-1]]
        settings = {"rows": self._method.fisher_rows, "seed": self._config.seed}
        self._add("fisher", task.name, settings, inputs)

    def _score(self, task: TaskConfig, earlier: list[str]) -> None:
        assert isinstance(self._method, SEEKR)
        settings = scoring(self._config, self._method, self._facts.shape)
        inputs = {
            "after": self._latest["train", task.name],
            "replay": self._latest["sample", task.name],
        }
        self._add("score", task.name, settings, inputs | self._model("before", earlier))

    def _select(self, task: TaskConfig, known: list[str]) -> None:
        assert isinstance(self._method, SEEKR)
        fields = {"layer_budget", "head_budget", "heads", "definition", "combine"}
        settings = self._method.model_dump(mode="json", include=fields)
        if self._method.heads == "random":
            settings["seed"] = self._config.seed
        inputs = {f"scores.{name}": self._latest["score", name] for name in known}
        self._add("select", task.name, settings, inputs)

    def _teach(self, known: list[str]) -> None:
        """Write targets of the newest task, and of earlier ones if their heads are chosen anew."""
        method, newest = self._method, known[-1]
        again = self._on_policy or (isinstance(method, SEEKR) and method.scope == "global")
        for name in known if again else [newest]:
            inputs = {"teacher": self._latest["train", name], "replay": self._kept(name)}
            if isinstance(method, SAPT) and method.reflection == "mean":
                inputs["data"] = self._latest["ingest", name]
            label = name if name == newest else retaught(name, newest)
            found = self._add(
                "teach", label, replay_targets(self._config), inputs | self._heads(newest)
            )
            self._latest["teach", name] = found

    def _heads(self, newest: str) -> dict[str, Stage]:
        """Return the input that names the heads chosen after a task."""
        return {"heads": self._latest["select", newest]} if self._method.needs.heads else {}

    def _foretell(self, task: TaskConfig, previous: str) -> None:
        """Write targets on a new task's rows, by the model that will start to learn it."""
        inputs = {
            "teacher": self._latest["train", previous],
            "data": self._latest["ingest", task.name],
        }
        label, settings = foretold(task.name, previous), targets(self._config, logits=True)
        self._latest["teach", task.name] = self._add("teach", label, settings, inputs)

    def _evaluate(self, learnt: str, tasks: list[str]) -> None:
        if not self._config.is_tested(self._config.tasks[0]):  # then no task is
            return
        inputs = {f"data.{name}": self._latest["ingest", name] for name in tasks}
        inputs[f"model.{learnt}"] = self._latest["train", learnt]
        self._add("evaluate", learnt, decoding(self._config, tasks), inputs)

    def _evaluate_before(self, task: TaskConfig, previous: str) -> None:
        inputs = {
            f"data.{task.name}": self._latest["ingest", task.name],
            f"model.{previous}": self._latest["train", previous],
        }
        sources = {f"model.{BASE}": self._facts.model_digest}
        settings = decoding(self._config, [task.name])
        self._add("evaluate", before(task.name), settings, inputs, sources)

    def _add(
        self,
        name: str,
        task: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Stage],
        sources: Mapping[str, str] | None = None,
    ) -> Stage:
        if sources is None:
            base = {"train": "model", "score": "before"}.get(name)
            from_base = base is not None and base not in inputs
            sources = {base: self._facts.model_digest} if base and from_base else {}
        return self._keep(stage_of(name, task, settings, inputs, sources))

    def _keep(self, stage: Stage) -> Stage:
        self.stages.append(stage)
        self._latest[stage.name, stage.task] = stage
        return stage
