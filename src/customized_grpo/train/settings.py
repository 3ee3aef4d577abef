"""Settings of training. A run folder and the command line read them without importing torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from customized_grpo.settings import Role, Settings, Spec


class MethodSettings(Settings):
    """How rewards become advantages and a loss."""

    advantage: Annotated[Spec, Role.APPLIED] = Spec(use="sars", gamma=0.4)  # pyright: ignore[reportCallIssue]
    """sars, weighted_sum, raw_sum, gdpo, minimum, maximum, harmonic, product, identity_gate, cme, log_tamed,
    conflict_drop, sars_recentred, sars_by_conflict, or package.module:name."""
    time_weights: Annotated[Spec, Role.APPLIED] = Spec(use="sigmoid_crossover")
    """sigmoid_crossover (TDW), constant, linear, cosine, reversed_, piecewise, tabulated, from_file, by_loop_index, or
    package.module:name."""
    advantage_clamp: Annotated[float, Role.APPLIED] = Field(default=5.0, gt=0)
    """Advantages are clamped to plus or minus this value."""
    clip_range: Annotated[float, Role.APPLIED] = Field(default=1e-3, gt=0)
    """c of the clipped surrogate; 1e-4 in the paper's recipe."""
    ratio_norm: Annotated[bool, Role.APPLIED] = True
    """Use GRPO-Guard's normalized log-ratio. Without it, the gradients of late steps, which have little noise, dominate
    those of early steps, where the prompt is decided."""
    beta: Annotated[float, Role.APPLIED] = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the base policy; requires an adapter."""


class RolloutSettings(Settings):
    """How trajectories are sampled."""

    num_generations: Annotated[int, Role.APPLIED] = Field(default=8, ge=2)
    """G: images per prompt. At least two, because advantages are relative to the group."""
    num_inference_steps: Annotated[int, Role.KEPT] = Field(default=10, ge=2)
    """T: denoising steps, in training and in evaluation."""
    dynamics: Annotated[Spec, Role.APPLIED] = Spec(use="flow_sde", noise_level=0.7)  # pyright: ignore[reportCallIssue]
    """The stochastic step: dance_sde, flow_sde, cps, or package.module:name."""
    steps: Annotated[Spec, Role.APPLIED] = Spec(use="random_fraction", fraction=0.6)  # pyright: ignore[reportCallIssue]
    """Which steps are stochastic and trained: all_steps, random_fraction, sliding_window, or package.module:name."""
    share_initial_noise: Annotated[bool, Role.APPLIED] = True
    """Start all generations of a prompt from the same noise; they are computed once until the first stochastic step."""
    chunk_prompts: Annotated[int | None, Role.RUNTIME] = Field(default=None, ge=1)
    """Prompts sampled in one batch; default: all. It affects memory, and the result only by rounding."""


class TrainingSettings(Settings):
    """The update, and the length of the run."""

    iterations: Annotated[int, Role.APPLIED] = Field(default=40, ge=1)
    """Number of iterations; one is a rollout followed by an update."""
    prompts_per_iteration: Annotated[int, Role.KEPT] = Field(default=8, ge=1)
    """Prompts per iteration over all processes; must be divisible by their number."""
    optimizer: Annotated[Spec, Role.ARGUMENTS] = Spec.model_validate(
        {"use": "AdamW", "lr": 1.5e-4, "betas": [0.9, 0.99], "weight_decay": 0.0}
    )
    """An optimizer of torch.optim, or package.module:name."""
    lr_schedule: Annotated[Literal["constant", "constant_with_warmup", "linear", "cosine"], Role.APPLIED] = "constant"
    """Learning rate schedule, as in diffusers' `get_scheduler`. A run resumed with more iterations continues on the
    schedule of its new length."""
    warmup_updates: Annotated[int, Role.APPLIED] = Field(default=0, ge=0)
    """Optimizer steps of linear warmup from 0, with any schedule."""
    max_grad_norm: Annotated[float, Role.APPLIED] = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    inner_epochs: Annotated[int, Role.APPLIED] = Field(default=1, ge=1)
    """Passes over each rollout per update."""
    updates_per_epoch: Annotated[int, Role.APPLIED] = Field(default=2, ge=1)
    """Optimizer steps per pass; the trained denoising steps are divided among them."""
    micro_batch: Annotated[int | None, Role.RUNTIME] = Field(default=None, ge=1)
    """Rows in one forward pass; default: a whole chunk, which reproduces the rollout's log-probabilities exactly."""
    old_log_probs: Annotated[Literal["rollout", "recompute"], Role.RUNTIME] = "rollout"
    """Source of the ratio's denominator. `recompute` first runs a pass in the batches of the update. Use it in bfloat16
    if the micro-batch differs from the rollout's, because rounding alone can then exceed the clip range."""
    ema_decay: Annotated[float, Role.APPLIED] = Field(default=0.9, ge=0, lt=1)
    """Decay of the moving average of the trained weights, used in evaluation and the saved adapter; 0 disables it."""


class EvaluationSettings(Settings):
    """Evaluation on held-out examples before, during and after training."""

    every: Annotated[int, Role.APPLIED] = Field(default=10, ge=0)
    """Iterations between evaluations; 0 evaluates only before and after training."""
    examples: Annotated[int, Role.KEPT] = Field(default=48, ge=0)
    """Number of held-out examples, from the start of the evaluation data; 0 disables evaluation."""
    replicates: Annotated[int, Role.KEPT] = Field(default=2, ge=1)
    """Images per example, each from its own fixed noise."""
    seed: Annotated[int, Role.KEPT] = 0
    """Seed of the fixed noise; independent of the run's seed, so that runs can be compared task by task."""
    batch: Annotated[int, Role.RUNTIME] = Field(default=48, ge=1)
    """Images sampled at once."""
    grid_rows: Annotated[int, Role.RUNTIME] = Field(default=8, ge=0)
    """Examples shown in the sample grids."""
    base: Annotated[Path | None, Role.KEPT] = None
    """File with an evaluation of the base policy on the same tasks and noise. It replaces the evaluation before
    training, so that runs that are compared share it."""


class TrackingSettings(Settings):
    """Trackers that receive metrics in addition to metrics.jsonl."""

    log_with: Annotated[tuple[str, ...], Role.RUNTIME] = ("tensorboard",)
    """Trackers by their names in accelerate: tensorboard, wandb, swanlab, trackio, ... One, a list, or [] for none."""
    project: Annotated[str, Role.RUNTIME] = "customized-grpo"
    """Project name in the tracker."""

    @field_validator("log_with", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class CheckpointSettings(Settings):
    """When checkpoints are written. The last iteration is always saved."""

    every: Annotated[int, Role.RUNTIME] = Field(default=10, ge=1)
    """Iterations between two checkpoints."""
    keep: Annotated[int, Role.RUNTIME] = Field(default=2, ge=0)
    """Number of latest checkpoints to keep; 0 keeps all."""


class TrainerConfig(Settings):
    """The settings of `Trainer`."""

    seed: Annotated[int, Role.KEPT] = 0
    """Random seed of the run."""
    output: Annotated[Path | None, Role.RUNTIME] = None
    """The run folder; default: a new one under runs/."""
    method: MethodSettings = MethodSettings()
    rollout: RolloutSettings = RolloutSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    tracking: TrackingSettings = TrackingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    def specs(self) -> list[tuple[str, str, Spec]]:
        """(setting, slot, spec) of every function and class that the configuration names."""
        return [
            ("method.advantage", "advantage", self.method.advantage),
            ("method.time_weights", "time_weights", self.method.time_weights),
            ("rollout.dynamics", "dynamics", self.rollout.dynamics),
            ("rollout.steps", "steps", self.rollout.steps),
            ("training.optimizer", "optimizer", self.training.optimizer),
        ]
