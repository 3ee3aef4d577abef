"""Settings of training. A run folder and the command line read them without importing torch."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from customized_grpo.errors import UserError
from customized_grpo.settings import Role, Settings, Spec
from customized_grpo.settings.parse import over_spec, parse_config


class DifficultySettings(Settings):
    """Prompts that the policy still fails count more: clip((1 - the group's mean)^power, low, high), over its mean."""

    reward: str
    """The reward that says how well a prompt is served, in [0, 1]."""
    power: float = Field(default=2.0, ge=0)
    """0 weighs all groups alike."""
    low: float = Field(default=0.5, gt=0)
    """Least weight before the division by the mean over the batch."""
    high: float = Field(default=5.0, gt=0)
    """Greatest weight before that division."""


class MethodSettings(Settings):
    """How rewards become advantages and a loss."""

    advantage: Annotated[Spec, Role.APPLIED] = Spec(use="sars", gamma=0.4)
    """sars, weighted_sum, raw_sum, gdpo, minimum, maximum, harmonic, product, identity_gate, cme, log_tamed,
    conflict_drop, sars_recentred, sars_by_conflict, or package.module:name."""
    time_weights: Annotated[Spec, Role.APPLIED] = Spec(use="sigmoid_crossover")
    """sigmoid_crossover (TDW), constant, linear, cosine, reversed_, piecewise, tabulated, from_file, by_loop_index, or
    package.module:name."""
    rewards: Annotated[tuple[str, ...] | None, Role.APPLIED] = Field(default=None, min_length=1)
    """Rewards or metrics that train, in column order; the others are only measured. Null is all rewards."""
    kind_weights: Annotated[dict[str, dict[str, float]], Role.APPLIED] = Field(default={})
    """Kind of prompt to reward to a factor of its weight, such as {property: {identity: 0.25}}. The weights of a
    step keep their sum."""
    difficulty: Annotated[DifficultySettings | None, Role.APPLIED] = None
    """Weights of whole groups by a reward, such as {reward: prompt}; null weighs all alike."""
    advantage_clamp: Annotated[float, Role.APPLIED] = Field(default=5.0, gt=0)
    """Advantages are clamped to plus or minus this value."""
    clip_range: Annotated[float | None, Role.APPLIED] = Field(default=None, gt=0)
    """c of the clipped surrogate; 1e-4 in the paper's recipe. Null is 1e-3 for grpo and 1 for awm; nft has none."""
    ratio_norm: Annotated[bool | None, Role.APPLIED] = None
    """For grpo, where null is true: use GRPO-Guard's normalized log-ratio. Without it, the gradients of late steps,
    which have little noise, dominate those of early steps, where the prompt is decided."""
    credit: Annotated[Spec | None, Role.APPLIED] = None
    """For grpo, where null is final: what a trained step is credited with, final (the rewards of the image), stepwise
    (what the step adds to those of the predicted image), or package.module:name."""
    beta: Annotated[float, Role.APPLIED] = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the base policy, of nft and awm that of velocities. Full training keeps a copy
    of the base weights for it."""
    norm_hinge: Annotated[float, Role.APPLIED] = Field(default=0.0, ge=0)
    """Weight of max(|v| / |v_base| - 1, 0), which holds back the norm of the velocity (NormGuard). It needs the base
    policy as `beta` does."""

    @property
    def needs_base(self) -> bool:
        """Whether a term of the loss compares with the base policy."""
        return self.beta > 0 or self.norm_hinge > 0


class RolloutSettings(Settings):
    """How trajectories are sampled."""

    num_generations: Annotated[int, Role.APPLIED] = Field(default=8, ge=2)
    """G: images per prompt. At least two, because advantages are relative to the group."""
    num_inference_steps: Annotated[int, Role.KEPT] = Field(default=10, ge=2)
    """T: denoising steps in training."""
    solver: Annotated[Literal["euler", "heun"], Role.APPLIED] = "euler"
    """Of the steps without noise: all but those of grpo. heun takes two passes a step, and errs less in few steps."""
    dynamics: Annotated[Spec | None, Role.APPLIED] = None
    """For grpo, the stochastic step: dance_sde, flow_sde, cps, or package.module:name. Null is flow_sde with
    noise_level 0.7. The other objectives sample without noise."""
    steps: Annotated[Spec | None, Role.APPLIED] = None
    """For grpo, which steps are stochastic and trained: all_steps, random_fraction, sliding_window, or
    package.module:name. Null is random_fraction with fraction 0.6."""
    share_initial_noise: Annotated[bool | None, Role.APPLIED] = None
    """Start all generations of a prompt from the same noise; they are computed once until the first stochastic step.
    Null is true for grpo. The other objectives need separate noise."""
    chunk_prompts: Annotated[int | None, Role.RUNTIME] = Field(default=None, ge=1)
    """Prompts sampled in one batch; default: all. It affects memory, and the result only by rounding."""


class TrainingSettings(Settings):
    """The update, and the length of the run."""

    iterations: Annotated[int, Role.APPLIED] = Field(default=40, ge=1)
    """Number of iterations; one is a rollout followed by an update."""
    early_stop: Annotated[int | None, Role.APPLIED] = Field(default=None, ge=1)
    """Stop when the held-out worst-reward gain has not improved in this many evaluations; null never does."""
    prompts_per_iteration: Annotated[int, Role.KEPT] = Field(default=8, ge=1)
    """Prompts per iteration over all processes; must be divisible by their number."""
    kinds: Annotated[dict[str, Annotated[int, Field(ge=0)]], Role.KEPT] = Field(default={})
    """Kind of prompt to how often it is drawn in a round of prompts, such as {recontext: 1, property: 2}; {} draws them
    by their shares of the data. Rounds do not depend on prompts_per_iteration."""
    optimizer: Annotated[Spec, Role.ARGUMENTS] = Spec.model_validate(
        {"use": "AdamW", "lr": None, "betas": [0.9, 0.99], "weight_decay": 0.0}
    )
    """An optimizer of torch.optim, or package.module:name. The learning rate null is 1.5e-4 for grpo, else 3e-4."""
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
    """Optimizer steps per pass; the trained steps or levels are divided among them."""
    micro_batch: Annotated[int | None, Role.RUNTIME] = Field(default=None, ge=1)
    """Rows in one forward pass; default: a whole chunk, which reproduces the rollout's log-probabilities exactly."""
    old_log_probs: Annotated[Literal["rollout", "recompute"] | None, Role.RUNTIME] = None
    """For grpo, source of the ratio's denominator; null is `rollout`. `recompute` computes it in the batches of the
    update: for the first optimizer step in its own passes, for later ones in a pass before. Use it in bfloat16 if the
    micro-batch differs from the rollout's, because rounding alone can then exceed the clip range."""
    sharding: Annotated[Literal["none", "fsdp2", "fsdp2_offload"], Role.RUNTIME] = "none"
    """fsdp2 gives each process a part of the transformer's weights, gradients and optimizer state instead of a copy of
    all. fsdp2_offload also keeps them in the memory of the host while they are not used."""
    preflight: Annotated[bool, Role.RUNTIME] = True
    """Before the run, refuse a model that cannot fit on the GPU, and measure the run's memory and time with a few
    passes."""
    ema_decay: Annotated[float, Role.APPLIED] = Field(default=0.9, ge=0, lt=1)
    """Decay of the moving average of the trained weights, used in evaluation and the saved adapter; 0 disables it."""


class EvaluationSettings(Settings):
    """Evaluation on held-out examples before, during and after training."""

    every: Annotated[int, Role.APPLIED] = Field(default=10, ge=0)
    """Iterations between evaluations; 0 evaluates only before and after training."""
    num_inference_steps: Annotated[int | None, Role.KEPT] = Field(default=None, ge=2)
    """Denoising steps in evaluation and of generated images; null is those of training."""
    solver: Annotated[Literal["euler", "heun"], Role.KEPT] = "euler"
    """Of evaluated and generated images; pipelines use euler."""
    guidance_scale: Annotated[float | None, Role.KEPT] = Field(default=None, ge=0)
    """Embedded guidance of evaluated and generated images; null is that of the policy."""
    true_cfg_scale: Annotated[float | None, Role.KEPT] = Field(default=None, ge=1)
    """Classifier-free guidance of evaluated and generated images, 1 for none; null is that of the policy."""
    resolution: Annotated[int | None, Role.KEPT] = Field(default=None, ge=1)
    """Evaluated and generated images have about resolution^2 pixels; null is the size that the policy has."""
    examples: Annotated[int, Role.KEPT] = Field(default=48, ge=0)
    """Number of held-out examples, from the start of the evaluation data; 0 disables evaluation."""
    replicates: Annotated[int, Role.KEPT] = Field(default=2, ge=1)
    """Images per example, each from its own fixed noise."""
    seed: Annotated[int, Role.KEPT] = 0
    """Seed of the fixed noise; independent of the run's seed, so that runs can be compared task by task."""
    batch: Annotated[int, Role.RUNTIME] = Field(default=48, ge=1)
    """Images sampled at once."""
    grid_rows: Annotated[int, Role.RUNTIME] = Field(default=8, ge=0)
    """Examples shown in the sample grids; 0 keeps no images."""
    base: Annotated[Path | None, Role.KEPT] = None
    """File with an evaluation of the base policy on the same tasks and noise. It replaces the evaluation before
    training, so that runs that are compared share it."""

    def of_policy(self) -> dict[str, Any]:
        """How evaluated and generated images are sampled otherwise than in training: for `Policy.sampled_with`."""
        return {name: getattr(self, name) for name in ("guidance_scale", "true_cfg_scale", "resolution")}


class GrpoSettings(Settings):
    """Arguments of the objective grpo."""

    divergence_threshold: float | None = Field(default=None, gt=0)
    """Null clips the ratio. A number drops steps that have moved further from the old policy instead, in nats per
    latent element (Flow-DPPO; 1e-5 in its code)."""


class ForwardSettings(Settings):
    """Arguments that the objectives on the forward process share."""

    levels: int = Field(default=4, ge=1)
    """S: noise levels of one iteration, the same for all images."""
    window: tuple[float, float] = (0.0, 1.0)
    """Progress from which and before which levels are drawn; 0 is noise, 1 the image."""
    continuous: bool = False
    """Draw one level from each of S equal parts of the window. Otherwise draw S of the sampling steps inside it."""
    advantage_clip: float | None = Field(default=None, gt=0)
    """c: advantages are clipped to plus or minus this value. Null is 1.25, or 1.8 with normalize=batch."""
    normalize: Literal["none", "batch"] = "none"
    """Divide advantages by their standard deviation over the batch of all processes, before the clip."""
    centre: bool = False
    """Subtract the mean of the group from advantages, which aggregations such as SARS do not leave at 0."""
    decay: float = Field(default=0.3, ge=0, lt=1)
    """Share of the old policy that remains after an iteration; with `decay_rate` the largest."""
    decay_rate: float | None = Field(default=None, gt=0)
    """Grow the decay by this much per optimizer step; null keeps it constant."""
    offload_old: bool = False
    """Keep the old policy in the memory of the host, for full training of large models."""

    @model_validator(mode="before")
    @classmethod
    def _fill_clip(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("advantage_clip") is not None:
            return values
        return {**values, "advantage_clip": 1.8 if values.get("normalize") == "batch" else 1.25}

    @field_validator("window")
    @classmethod
    def _window_is_one(cls, window: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= window[0] < window[1] <= 1:
            raise ValueError("two ascending numbers from 0 to 1")
        return window


class NftSettings(ForwardSettings):
    """Arguments of the objective nft."""

    mix: float = Field(default=1.0, gt=0)
    """The paper's beta: how far the new velocity moves the mixtures from the old one."""


class AwmSettings(ForwardSettings):
    """Arguments of the objective awm."""

    weighting: Literal["uniform", "sigma", "sigma_squared", "huber", "ghuber"] = "ghuber"
    """How the matching error counts as a log-probability."""
    power: float = Field(default=0.25, gt=0)
    """Of ghuber."""
    old_beta: float = Field(default=1.0, ge=0)
    """Weight of the KL divergence of velocities from the old policy, a moving average of the trained one."""


OBJECTIVES: dict[str, type[Settings]] = {"grpo": GrpoSettings, "nft": NftSettings, "awm": AwmSettings}
"""Those of this package, with their arguments."""
FLOW_SDE = Spec(use="flow_sde", noise_level=0.7)
RANDOM_STEPS = Spec(use="random_fraction", fraction=0.6)
FINAL = Spec(use="final")
DEPENDENT: dict[str, dict[str, Any]] = {
    "method.clip_range": {"grpo": 1e-3, "awm": 1.0},
    "method.ratio_norm": {"grpo": True},
    "method.credit": {"grpo": FINAL, "flow_dppo": FINAL},
    "rollout.dynamics": {"grpo": FLOW_SDE, "flow_dppo": FLOW_SDE},
    "rollout.steps": {"grpo": RANDOM_STEPS, "flow_dppo": RANDOM_STEPS},
    "rollout.share_initial_noise": {"grpo": True, "flow_dppo": True, "nft": False, "awm": False},
    "training.old_log_probs": {"grpo": "rollout", "flow_dppo": "rollout"},
}
"""What null means in a setting, by objective; flow_dppo is grpo with a divergence_threshold. An objective of this
package that is not listed has no use for the setting."""
LEARNING_RATES = {"grpo": 1.5e-4, "flow_dppo": 1.5e-4}
"""What null means as the learning rate; 3e-4 for other objectives."""


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
    keep_best: Annotated[bool, Role.RUNTIME] = True
    """Keep also the checkpoint with the best held-out worst-reward gain, of those whose iteration was evaluated."""


VERIFIED = {
    "none": "none: nobody has run this recipe",
    "tiny": "tiny: run on small random weights only, so its settings are a starting point",
}
"""What a word in `verified` means."""


class TrainerConfig(Settings):
    """The settings of `Trainer`."""

    seed: Annotated[int, Role.KEPT] = 0
    """Random seed of the run."""
    output: Annotated[Path | None, Role.RUNTIME] = None
    """The run folder; default: a new one under runs/."""
    verified: Annotated[str | None, Role.RUNTIME] = None
    """What a recipe was run on: none, tiny (small random weights), or full (hardware, date). It is shown when a run
    starts; a file that extends the recipe does not have it."""
    objective: Annotated[Spec, Role.ARGUMENTS] = Spec(use="grpo")
    """What is trained on: grpo, nft, awm, or package.module:name. It also decides what null means in other settings."""
    method: MethodSettings = MethodSettings()
    rollout: RolloutSettings = RolloutSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    tracking: TrackingSettings = TrackingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    @field_validator("verified")
    @classmethod
    def _verified_says_on_what(cls, value: str | None) -> str | None:
        if value not in (None, *VERIFIED) and not re.fullmatch(r"full \(.+, \d{4}-\d\d-\d\d\)", value):
            raise ValueError("none, tiny, or full (hardware, date), such as 'full (1 x H100, 2026-11-29)'")
        return value

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Fill in what depends on the objective, and refuse what means nothing with it."""
        objective = _with_arguments(_plain(values.get("objective", "grpo")))
        names = ("method", "rollout", "training", "evaluation")
        sections = {name: dict(part) for name in names if isinstance(part := _plain(values.get(name, {})), Mapping)}
        named = isinstance(objective, Mapping) and isinstance(objective.get("use"), str)
        if not named or len(sections) < len(names):
            return values  # which is refused
        for setting in DEPENDENT:
            section, _, name = setting.partition(".")
            sections[section][name] = _filled(setting, sections[section].get(name), objective)
        training, evaluation = sections["training"], sections["evaluation"]
        optimizer = _plain(training.get("optimizer", TrainingSettings.model_fields["optimizer"].default))
        if isinstance(optimizer, Mapping) and "lr" in optimizer and optimizer["lr"] is None:
            training["optimizer"] = {**optimizer, "lr": LEARNING_RATES.get(_kind(objective), 3e-4)}
        if evaluation.get("num_inference_steps") is None:
            default = RolloutSettings.model_fields["num_inference_steps"].default
            evaluation["num_inference_steps"] = sections["rollout"].get("num_inference_steps", default)
        return {**values, **sections, "objective": objective}

    @property
    def evaluation_steps(self) -> int:
        """Denoising steps in evaluation and of generated images."""
        return self.evaluation.num_inference_steps or self.rollout.num_inference_steps

    def resolved(self) -> "TrainerConfig":
        """The same with everything filled in that depends on the objective."""
        return parse_config(dict(self), type(self))

    def specs(self) -> list[tuple[str, str, Spec]]:
        """(setting, slot, spec) of every function and class that the configuration names."""
        found = [
            ("objective", "objective", self.objective),
            ("method.advantage", "advantage", self.method.advantage),
            ("method.time_weights", "time_weights", self.method.time_weights),
            ("method.credit", "credit", self.method.credit),
            ("rollout.dynamics", "dynamics", self.rollout.dynamics),
            ("rollout.steps", "steps", self.rollout.steps),
            ("training.optimizer", "optimizer", self.training.optimizer),
        ]
        return [(setting, slot, spec) for setting, slot, spec in found if spec is not None]


def _plain(value: Any) -> Any:
    """Settings and specs as the mapping that they would be read from."""
    return value.model_dump() if isinstance(value, Settings | Spec) else value


def _with_arguments(objective: Any) -> Any:
    """An objective of this package with all its arguments; anything else as it is."""
    objective = {"use": objective} if isinstance(objective, str) else objective
    settings = OBJECTIVES.get(str(objective.get("use"))) if isinstance(objective, Mapping) else None
    if settings is None:
        return objective
    given = {name: value for name, value in objective.items() if name != "use"}
    return {"use": objective["use"], **parse_config(given, settings, "objective").model_dump(mode="json")}


def _kind(objective: Mapping[str, Any]) -> str:
    return "flow_dppo" if objective.get("divergence_threshold") is not None else objective["use"]


def _filled(setting: str, value: Any, objective: Mapping[str, Any]) -> Any:
    """A setting that depends on the objective: what was written, or what null means.

    Raises:
        UserError: if it was written, and means nothing with the objective.
    """
    kind = _kind(objective)
    default = DEPENDENT[setting].get(kind)
    if value is None:
        return _plain(default)
    if objective["use"] in OBJECTIVES and (default is None or (default is False and value)):
        written = value["use"] if isinstance(value, Mapping) and "use" in value else value
        why = "with a divergence_threshold" if kind == "flow_dppo" else f"with the objective {kind}"
        raise UserError(
            f"{setting} is {json.dumps(written)}, which means nothing {why}; remove it, or use objective=grpo."
        )
    return over_spec(value, default) if isinstance(value, Mapping) and isinstance(default, Spec) else value
