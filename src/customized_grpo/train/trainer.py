"""Training on competing rewards, on accelerate: draw prompts, sample groups, score, compute advantages, update."""

import errno
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from customized_grpo import trust
from customized_grpo.data.images import resized
from customized_grpo.distributed import (
    any_process,
    combine,
    fail_together,
    gather,
    gather_objects,
    join,
    refuse_other_sharding,
    warn_of_missing_processes,
)
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.policies.contract import Policy, batches
from customized_grpo.randomness import generator, seed_global
from customized_grpo.rewards.scoring import RewardFunction, named, score, score_groups
from customized_grpo.settings.identity import changes_on_resume
from customized_grpo.shell import command
from customized_grpo.store.run import RunFolder, iteration_files
from customized_grpo.store.scores import Change, read_scores, write_scores
from customized_grpo.structures import Example, Rewards, Rollout
from customized_grpo.train import checkpoint as checkpoints
from customized_grpo.train import evaluation as evaluations
from customized_grpo.train.checkpoint import TrainingState
from customized_grpo.train.evaluation import Evaluation
from customized_grpo.train.grids import copy_grid, save_grid, save_groups, save_history
from customized_grpo.train.memory import explain_full_device
from customized_grpo.train.meters import Clock
from customized_grpo.train.method import Method, SpreadGuard, describe_advantages, describe_rewards
from customized_grpo.train.objectives import Plan, make_objective
from customized_grpo.train.preflight import Job, Summary, check_examples, check_plan, check_sizes, summarize
from customized_grpo.train.prompts import PromptStream
from customized_grpo.train.rollout import RowNoise
from customized_grpo.train.sharding import in_step, is_sharded, shard, whole
from customized_grpo.train.trackers import (
    check_trackers,
    end_training,
    peak_memory_gib,
    provenance,
    start_trackers,
    track,
    track_evaluation,
)
from customized_grpo.train.update import Updater

if TYPE_CHECKING:
    from customized_grpo.train.settings import TrainerConfig


GROUPS = 2
"""Training groups whose images are kept in the first iteration and those that are evaluated."""


class Observer:
    """What a display overrides. All methods do nothing here, and are called on the main process alone."""

    def on_start(self, summary: Summary) -> None:
        """Before the first iteration."""

    def on_stage(self, stage: str) -> None:
        """A stage begins: rollout, rewards, update or evaluation."""

    def on_iteration(self, record: Mapping[str, float]) -> None:
        """An iteration is done. The record is its line in metrics.jsonl; docs/metrics.md explains it."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Held-out examples were scored, or their scores taken over from another run."""

    def on_checkpoint(self, path: Path) -> None:
        """A checkpoint is complete."""

    def on_end(self, run: Path, status: str) -> None:
        """Everything is in the run folder but the status, finished or interrupted, which run.json gets after this."""

    def on_stop(self) -> None:
        """The last call, also after an error."""


@dataclass(frozen=True)
class Result:
    """What came out."""

    run: Path
    """The run folder."""
    changes: list[Change]
    """Of every metric, from the first evaluation to the last; empty without evaluation."""
    seconds: float
    interrupted: bool
    """Whether a signal ended it before the last iteration; a checkpoint was left."""
    stopped_early: bool = False
    """Whether `training.early_stop` ended it before the last iteration."""


class Trainer:
    """Train a policy on competing rewards.

    Args:
        policy: with an adapter (or everything) open for training.
        rewards: functions or objects `(images, examples) -> (B,)`, in column order, or a mapping with names.
        train_dataset: a sequence of examples.
        eval_dataset: held-out examples; None for no evaluation.
        config: see `TrainerConfig`.
        metrics: measured in evaluation, never trained on.

    Raises:
        UserError: if the parts do not fit together.
    """

    def __init__(
        self,
        policy: Policy,
        rewards: Sequence[RewardFunction] | Mapping[str, RewardFunction],
        train_dataset: Sequence[Example],
        eval_dataset: Sequence[Example] | None = None,
        config: "TrainerConfig | None" = None,
        metrics: Mapping[str, RewardFunction] | None = None,
    ) -> None:
        from customized_grpo.train.settings import TrainerConfig

        self.policy, self.rewards, self.metrics = policy, named(rewards), dict(metrics or {})
        self.config = (config or TrainerConfig()).resolved()
        self.train_dataset = train_dataset
        count = self.config.evaluation.examples
        self.eval_examples = [eval_dataset[i] for i in range(min(count, len(eval_dataset)))] if eval_dataset else []
        refuse_other_sharding()
        self.accelerator = join(cpu=policy.device.type == "cpu")
        warn_of_missing_processes(self.accelerator.num_processes)
        shard(policy, self.config.training.sharding, self.accelerator)
        self.method = Method(self.config.method, self.rewards, self.metrics)
        self.measured = {**self.rewards, **self.metrics}
        self.trained = {name: self.measured[name] for name in self.method.names}
        self.copies: dict[str, Tensor] = {}
        """Example id to what unedited copies of its references score, (K,)."""
        self.objective = make_objective(policy, self.config)
        if self.config.training.early_stop and not self.eval_examples:
            raise UserError("training.early_stop needs held-out evaluations; give data.eval, or set it to null.")
        check_sizes(self.config, len(train_dataset), self.accelerator.num_processes)
        self.prompts = PromptStream(train_dataset, self.config.seed, self.config.training.kinds)
        check_examples(policy, self.method, train_dataset, self.eval_examples)
        self.objective.check()
        with policy.sampled_with(**self.config.evaluation.of_policy()):
            pass  # whether it takes them
        check_plan(self.objective, self.method)
        check_trackers(self.config.tracking)
        self.update = Updater(
            self.objective, self.config.training, self.accelerator, self.config.seed, self._updates_after(0)
        )
        self.spread_guard, self.clock, self.observer = SpreadGuard(), Clock(), Observer()
        self.iteration, self.samples = 0, 0
        self.stop_requested = False

    def job(self) -> Job:
        """What preflight counts from."""
        return Job(
            self.config, self.objective, self.update.optimizer, self.train_dataset[0], self.trained,
            {name: metric for name, metric in self.measured.items() if name not in self.trained},
            held_out=len(self.eval_examples), processes=self.accelerator.num_processes, iteration=self.iteration,
        )  # fmt: skip

    # ---- the loop

    def train(
        self, observer: Observer | None = None, *, resume: RunFolder | None = None, config_yaml: str | None = None
    ) -> Result:
        """Run to the end, or until SIGINT, SIGTERM or SIGHUP, which leaves a checkpoint.

        Args:
            observer: told what happens, for a display.
            resume: a run folder to go on in; None starts a new one at `config.output`.
            config_yaml: text of RUN/config.yaml; None writes the trainer's own settings.

        Raises:
            UserError: for an output in use, a run that another process trains, a checkpoint of another model, a reward
                that fails or a full device.
            TrainingError: from a guard, because going on would train nothing or nonsense.
        """
        self.observer, started = observer or Observer(), time.monotonic()
        with self._signals(), ExitStack() as held:
            run = self._open_run(resume, config_yaml, held)
            try:
                with fail_together(self.accelerator), in_step(self.policy):
                    start_trackers(self.accelerator, self.config.tracking, run)
                    if self.accelerator.is_main_process:
                        self._tell(self.observer.on_start, summarize(self.job(), run))
                    elif is_sharded(self.policy):  # whose passes need all processes
                        summarize(self.job(), run, write=False)
                last = self._evaluate(run) if self._is_missing_evaluation(run) else None
                first = last if self.iteration == 0 else None
                early = self._is_exhausted(run)
                while self.iteration < self.config.training.iterations and not early and not self._should_stop():
                    record = self._iterate(run)
                    try:
                        last = self._evaluate(run) if self._is_due(self.config.evaluation.every) else None
                    finally:
                        self._track(run, record)
                    early = self._is_exhausted(run)
                    if self._should_stop() or early or self._is_due(self.config.checkpoint.every):
                        self._save(run)
                return self._finish(run, first, last, started, early)
            except BaseException as error:
                with suppress(UserError, OSError):  # the first error is the one to tell
                    self._close(run, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed", started)
                if isinstance(error, UserError):
                    with suppress(UserError, MemoryError):
                        self._save_before_failure(run, error)
                if isinstance(error, UserError | TrainingError):
                    error.advice = (
                        f"{_last_checkpoint(run)} When that is mended, go on with: "
                        f"{command('train', '--resume', run.path)}"
                    )
                raise
            finally:
                if self.accelerator.is_main_process:
                    self._tell(self.observer.on_stop)

    def _iterate(self, run: RunFolder) -> dict[str, float]:
        """One iteration: prompts, groups, scores, advantages, update."""
        iteration, settings = self.iteration + 1, self.config.rollout
        self._begin()
        self.clock.reset()
        seed_global("iteration", self.config.seed, iteration, self.accelerator.process_index)
        # 1. and 2. Draw prompts, sample groups, score them.
        self._stage("rollout")
        with fail_together(self.accelerator):
            chunks, plan = self._chunks(*self._draw(iteration)), self.objective.plan(iteration)
            rollouts, scored = self._sample_and_score(iteration, chunks, plan)
            examples = [example for chunk in chunks for _, example in chunk]
            factors = self.method.factors(examples)
            copies = self._copies(examples, rollouts) if self.method.wants_copies else None
        rewards = gather(self.accelerator, torch.cat([some.values for some in scored]))
        factors = gather(self.accelerator, factors)
        copies = None if copies is None else gather(self.accelerator, copies).unsqueeze(1)
        credited = [some.credited for some in scored if some.credited is not None]
        signal = gather(self.accelerator, torch.cat(credited)) if credited else rewards
        # 3. Scores to advantages, over the groups of all processes.
        draw = generator("weights", self.config.seed, iteration)
        with fail_together(self.accelerator):
            self.spread_guard.check(rewards, self.method.names, iteration)
            weights = self.method.weights(plan.progress, settings.num_inference_steps, draw)
            everyone = self.method.advantages(signal, weights, factors, copies)
            clamp = self.config.method.advantage_clamp
            told = describe_rewards(rewards, self.method.names) | describe_advantages(everyone, rewards, clamp)
            everyone, more = self.objective.advantages(everyone, rewards.isfinite().any(dim=-1))
        share = len(everyone) // self.accelerator.num_processes
        own = everyone[share * self.accelerator.process_index :][:share].flatten(0, 1)
        # 4. Update.
        self._stage("update")
        with self.clock("update"):
            record = self.update(iteration, rollouts, own.to(self.policy.device))
        self.iteration, self.samples = iteration, self.samples + rewards.shape[0] * rewards.shape[1]
        kept = min(GROUPS, self.config.evaluation.grid_rows, len(chunks[0]))
        wanted = self.accelerator.is_main_process and (iteration == 1 or self._is_due(self.config.evaluation.every))
        if wanted and kept:
            save_groups(
                run.samples, iteration, examples[:kept], rollouts[0].images, rewards[:kept], everyone[:kept],
                self.method.names,
            )  # fmt: skip
        return told | more | record

    def _begin(self) -> None:
        """Remember what an iteration or an evaluation that fails must not leave behind."""
        self._before = dict(self.spread_guard.streak)

    # ---- 1. prompts and groups

    def _draw(self, iteration: int) -> tuple[list[int], list[Example]]:
        """This process's slots and examples."""
        count = self.config.training.prompts_per_iteration
        share = count // self.accelerator.num_processes
        slots = list(range(share * self.accelerator.process_index, share * (self.accelerator.process_index + 1)))
        return slots, [self.train_dataset[self.prompts[(iteration - 1) * count + slot]] for slot in slots]

    def _updates_after(self, iteration: int) -> int:
        """Optimizer steps of the iterations after this one, no more per epoch than there are trained steps."""
        training = self.config.training
        if training.lr_schedule not in ("linear", "cosine"):
            return 0  # no other schedule asks
        counts = (len(self.objective.plan(n).progress) for n in range(iteration + 1, training.iterations + 1))
        return training.inner_epochs * sum(min(training.updates_per_epoch, count) for count in counts)

    def _chunks(self, slots: list[int], examples: list[Example]) -> list[list[tuple[int, Example]]]:
        """(slot, example) pairs in chunks whose examples can be encoded together."""
        size = self.config.rollout.chunk_prompts or len(slots)
        return batches(self.policy, zip(slots, examples, strict=True), size, lambda pair: pair[1])

    def _sample_and_score(
        self, iteration: int, chunks: list[list[tuple[int, Example]]], plan: Plan
    ) -> tuple[list[Rollout], list[Rewards]]:
        """With several chunks, one is scored while the next is sampled; what is left to wait for counts as rewards."""
        settings = self.config.rollout

        def score(rollout: Rollout, chunk: list[tuple[int, Example]]) -> Rewards:
            def of(images: torch.Tensor) -> Rewards:
                examples = [example for _, example in chunk]
                return score_groups(images, examples, self.trained, settings.num_generations)

            final = of(rollout.images)
            if not rollout.previews:
                return final
            assert plan.steps is not None
            seen = {step: of(images).values for step, images in rollout.previews.items()}
            seen[settings.num_inference_steps] = final.values
            return replace(final, credited=self.method.credited(seen, plan.steps.trained))

        rollouts: list[Rollout] = []
        waiting: list[Future[Rewards]] = []
        with ThreadPoolExecutor(1) as beside:
            together = in_step(self.policy)
            with together, explain_full_device(self.policy.device, "rollout"), self.objective.sampling():
                with self.clock("rollout"):
                    self.policy.encode_ahead([example for chunk in chunks for _, example in chunk])
                for chunk in chunks:
                    rollouts.append(self._collect(iteration, chunk, plan))
                    if len(chunks) > 1:
                        waiting.append(beside.submit(score, rollouts[-1], chunk))
            self._stage("rewards")
            with self.clock("rewards"), explain_full_device(self.policy.device, "rewards"):
                scored = [future.result() for future in waiting] or [score(rollouts[0], chunks[0])]
        return [replace(rollout, previews={}) for rollout in rollouts], scored

    def _copies(self, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> Tensor:
        """(P, K) what unedited copies of the references score for each example, the best of its references."""
        height, width = rollouts[0].images.shape[-2:]
        with self.clock("rewards"):
            for example in examples:
                if example.id not in self.copies:
                    pictures = [resized(picture, height, width) for picture in example.references]
                    scores = score(torch.stack(pictures), [example] * len(pictures), self.trained)
                    self.copies[example.id] = scores.nan_to_num(nan=-torch.inf).amax(dim=0)
        copies = torch.stack([self.copies[example.id] for example in examples])
        return torch.where(copies.isfinite(), copies, torch.nan)

    def _collect(self, iteration: int, chunk: list[tuple[int, Example]], plan: Plan) -> Rollout:
        with self.clock("rollout"):
            conditioning = self.policy.encode([example for _, example in chunk])
        slots, generations = [slot for slot, _ in chunk], self.config.rollout.num_generations
        noise = RowNoise(self.config.seed, iteration, slots, generations)
        return self.objective.collect(conditioning, plan, noise, self.clock)

    # ---- evaluation, tracking, checkpoints

    def _is_due(self, every: int) -> bool:
        return self.iteration == self.config.training.iterations or bool(every and self.iteration % every == 0)

    def _is_exhausted(self, run: RunFolder) -> bool:
        """Whether so many evaluations as `training.early_stop` have not improved the held-out worst-reward gain."""
        patience, exhausted = self.config.training.early_stop, False
        if patience is None or not self.iteration or not self._is_due(self.config.evaluation.every):
            return False
        if self.accelerator.is_main_process:
            gains = run.gains(iteration for iteration, _ in iteration_files(run.evaluations, ".json"))
            best = max(gains, key=lambda iteration: gains[iteration], default=self.iteration)
            exhausted = sum(iteration > best for iteration in gains) >= patience
        return any_process(self.accelerator, exhausted)

    def _is_missing_evaluation(self, run: RunFolder) -> bool:
        """Before the first iteration, or because the run ended in the evaluation after this one."""
        due = self._is_due(self.config.evaluation.every)
        return self.iteration == 0 or (due and not run.evaluation(self.iteration).is_file())

    def _reuse(self, base: Path, run: RunFolder) -> Evaluation:
        """The base policy's evaluation, its scores and pictures copied into the run."""
        evaluation = evaluations.reuse(base, self.eval_examples, list(self.measured), self.config.evaluation.replicates)
        if self.accelerator.is_main_process:
            write_scores(run.evaluation(0), evaluation.scores)
            copy_grid(base.parent, base.stem, run.samples)
            self._show(run, evaluation)
        return evaluation

    def _evaluate(self, run: RunFolder) -> Evaluation | None:
        if not self.eval_examples:
            return None
        if self.iteration == 0 and (base := self.config.evaluation.base):
            return self._reuse(base, run)
        self._begin()
        self._stage("evaluation")
        with self.clock("evaluation"), self.update.averaged_weights():
            evaluation = evaluations.evaluate(
                self.policy, self.eval_examples, self.rewards, self.metrics, self.config.evaluation,
                self.config.evaluation_steps, self.iteration, self.accelerator,
            )  # fmt: skip
            if self.accelerator.is_main_process:
                write_scores(run.evaluation(self.iteration), evaluation.scores)
                save_grid(evaluation, run.samples)
                self._show(run, evaluation)
        return evaluation

    def _show(self, run: RunFolder, evaluation: Evaluation) -> None:
        scores = evaluation.scores
        track_evaluation(self.accelerator, scores, run.samples / f"iteration-{scores.iteration:06d}.png")
        self._tell(self.observer.on_evaluation, evaluation)

    def _track(self, run: RunFolder, record: dict[str, float]) -> None:
        counters = {
            f"reward/{name}/{counter}": value
            for name, reward in self.trained.items()
            for counter, value in getattr(reward, "counters", {}).items()
        }
        peak = {"memory/peak_gib": peak_memory_gib(self.policy.device)}
        cut = gather_objects(self.accelerator, getattr(self.policy, "truncated_prompts", set[str]()))
        record = {
            "iteration": self.iteration, "samples": self.samples, **record,
            **combine(self.accelerator, mean=self.clock.record(), maximum=peak, total=counters),
        }  # fmt: skip
        if any(cut):
            record["prompts/truncated"] = len(set[str]().union(*cut))
        if not self.accelerator.is_main_process:
            return
        run.log(record)
        track(self.accelerator, record)
        self._tell(self.observer.on_iteration, record)

    def _save(self, run: RunFolder) -> None:
        self._begin()
        self._save_finished(run)

    def _save_finished(self, run: RunFolder) -> None:
        with fail_together(self.accelerator):
            weights = {"trainable": self.policy.trainable_state(), "ema": self.update.ema, **self.update.state()}
            weights = whole(weights, self.accelerator)
            if not self.accelerator.is_main_process:
                return
            counters = {
                "samples": self.samples,
                "updates": self.update.updates,
                "skipped": self.update.skipped,
                "streak": self._before,
                "first_norm": self.update.first_norm,
            }
            state = TrainingState(self.iteration, counters, **weights)
            gain = run.gains([self.iteration]).get(self.iteration)
            path = checkpoints.save(run.checkpoints, state, self.policy, run.config.read_text(encoding="utf-8"), gain)
            found = map(checkpoints.iteration_of, checkpoints.checkpoints(run.checkpoints))
            best = run.best(found) if self.config.checkpoint.keep_best else None
            checkpoints.prune(run.checkpoints, self.config.checkpoint.keep, best[0] if best else None)
            if best:
                run.describe(best_checkpoint={"iteration": best[0], "worst_reward_gain": best[1]})
            self._tell(self.observer.on_checkpoint, path)

    def _save_before_failure(self, run: RunFolder, error: UserError) -> None:
        """Keep the finished iterations, unless an optimizer step of the next one has changed the weights already."""
        everyone_is_here = self.accelerator.num_processes == 1 or error.shared
        if everyone_is_here and self.iteration and self.update.whole:
            self._save_finished(run)

    def _restore(self, run: RunFolder) -> None:
        found = checkpoints.checkpoints(run.checkpoints)
        if not found:
            if (logged := run.records()) and self.accelerator.is_main_process:
                warnings.warn(
                    f"The run in '{run.path}' has logged {len(logged)} iterations and has no checkpoint; it starts "
                    f"again from iteration 0, and metrics.jsonl with it.",
                    stacklevel=1,
                )
            return
        changed = changes_on_resume(found[-1], self.config)
        state, prefix = checkpoints.load(found[-1]), "training.optimizer."
        arguments = {name.removeprefix(prefix).split(".")[0] for name in changed if name.startswith(prefix)}
        try:
            counters = [state.progress[name] for name in ("samples", "updates", "skipped", "streak")]
        except KeyError as error:
            raise checkpoints.damaged(found[-1], f"state.json has no {error}") from error
        self.samples, self.update.updates, self.update.skipped, streak = counters
        self.update.first_norm = state.progress.get("first_norm")  # not in earlier versions
        self.spread_guard.streak = streak if isinstance(streak, dict) else {}  # one number in earlier versions
        self.iteration, done = state.iteration, self.update.updates + self.update.skipped
        self.update.restore(state, arguments, total=done + self._updates_after(self.iteration))

    # ---- the run folder

    def _open_run(self, resume: RunFolder | None, config_yaml: str | None, held: ExitStack) -> RunFolder:
        """The run folder, which the main process locks for as long as `held` is open."""
        from customized_grpo.settings.parse import to_yaml

        run = resume
        with fail_together(self.accelerator):
            if self.accelerator.is_main_process:
                run = resume or RunFolder.create(self.config.output)
                held.enter_context(run.lock())
                if resume is None:
                    run.check_free()  # again: another process may have been here before the lock
                    run.write(run.config.name, config_yaml or to_yaml(self.config))
                    run.describe(**provenance(), finished=None, status="running")
        run = RunFolder(Path(gather_objects(self.accelerator, str(run.path) if run else "")[0]))
        with fail_together(self.accelerator):
            if resume is not None:
                self._restore(run)
                if self.accelerator.is_main_process:
                    run.rewind(self.iteration)
                    run.adopt(config_yaml or to_yaml(self.config), self.iteration)
                    run.describe(status="running", finished=None)
        trust.remember(trust.items(self.config.specs()))  # who trained it may go on with it
        return run

    def _close(self, run: RunFolder, status: str, started: float) -> None:
        if self.accelerator.is_main_process:
            run.finish(status, seconds=round(time.monotonic() - started, 1))

    def _finish(
        self, run: RunFolder, first: Evaluation | None, last: Evaluation | None, started: float, early: bool
    ) -> Result:
        early = early and self.iteration < self.config.training.iterations
        interrupted = self.iteration < self.config.training.iterations and not early
        for reward in self.measured.values():
            if hasattr(reward, "close"):
                reward.close()  # pyright: ignore[reportFunctionMemberAccess] - a reward in a process of its own
        end_training(self.accelerator)
        changes: list[Change] = []
        if self.accelerator.is_main_process:
            save_history(run)
            with suppress(OSError, ValueError):  # missing or damaged: nothing to compare with
                before = first.scores if first else read_scores(run.evaluation(0))
                changes = evaluations.changes(before, last.scores) if last is not None else []
            status = "interrupted" if interrupted else "finished"
            run.describe(seconds=round(time.monotonic() - started, 1))
            self._tell(self.observer.on_end, run.path, status)
            self._close(run, status, started)
        return Result(run.path, changes, time.monotonic() - started, interrupted, early)

    # ---- small things

    def _stage(self, name: str) -> None:
        if self.accelerator.is_main_process:
            self._tell(self.observer.on_stage, name)

    def _tell(self, event: Callable[..., None], *what: Any) -> None:
        """Tell the observer. If what it writes to was closed, the run stops as after a signal, with a checkpoint."""
        try:
            event(*what)
        except (OSError, SystemExit) as error:  # rich turns a broken pipe into the latter
            if isinstance(error, OSError) and error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self.observer, self.stop_requested = Observer(), True

    def _should_stop(self) -> bool:
        """Whether any process was told to stop, agreed by all."""
        self.stop_requested = any_process(self.accelerator, self.stop_requested)
        return self.stop_requested

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP finish the iteration, save and stop. A second SIGINT stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self.stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_requested = True

        names = ("SIGINT", "SIGTERM", "SIGHUP")
        wanted = [getattr(signal, name) for name in names if hasattr(signal, name)]
        heard = [number for number in wanted if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        previous = {number: signal.signal(number, stop) for number in heard}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _last_checkpoint(run: RunFolder) -> str:
    found = checkpoints.checkpoints(run.checkpoints)
    return f"The last checkpoint is {found[-1].name}." if found else "There is no checkpoint yet."
