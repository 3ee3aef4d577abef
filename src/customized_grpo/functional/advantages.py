"""Advantages for competing rewards. Pure: tensors in, tensors out.

Notation: P prompts, G generations per prompt, K rewards, S trained steps.

An aggregation is `(z, weights, **settings)` or `(rewards, weights, **settings)`, (P, G, K) and (S, K) to (P, G, S);
weights that depend on the example are (P, S, K). The name of its first parameter says what it wants: `z` standard
scores, 0 where a reward could not score, or `rewards` raw values, NaN there. An aggregation with a parameter named
`scored` is also given the mask, bool (P, G, K). `advantages` reads these names and is the one door to all of them.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "cme",
    "conflict_drop",
    "gdpo",
    "harmonic",
    "identity_gate",
    "log_tamed",
    "maximum",
    "minimum",
    "product",
    "raw_sum",
    "sars",
    "sars_by_conflict",
    "sars_recentred",
    "weighted_sum",
]
"""What a configuration can name as `method.advantage`."""

Aggregation = Callable[..., Tensor]
Placement = Literal["std", "variance", "floor"]
"""Where an eps acts: it is added to the standard deviation or to the variance, or is the least standard deviation."""


def advantages(
    aggregation: Aggregation, rewards: Tensor, weights: Tensor, clamp: float = 5.0, **settings: Any
) -> Tensor:
    """Raw rewards to clamped advantages, through any aggregation.

    Args:
        aggregation: see the module; `settings` go to it.
        rewards: shape (P, G, K), raw units, higher is better; NaN marks an image a reward could not score.
        weights: shape (S, K), one row per trained step, or (P, S, K).
        clamp: bound on the magnitude, in standard scores.

    Returns:
        Shape (P, G, S), within +-clamp. 0 for an image that no reward could score, and where an aggregation of raw
        values returns NaN for an image with an unscored reward.

    Raises:
        ValueError: if the shapes do not fit, the aggregation's first parameter is neither `z` nor `rewards`, or it
            returns NaN for any other image.
    """
    check_shape(rewards, "P G K")
    check_weights(weights)
    if rewards.shape[-1] != weights.shape[-1]:
        raise ValueError(
            f"got {rewards.shape[-1]} rewards but {weights.shape[-1]} weights per step; give one per reward."
        )
    parameters = inspect.signature(aggregation).parameters
    wants = next(iter(parameters), None)
    if wants not in ("z", "rewards"):
        raise ValueError(f"an aggregation's first parameter must be named z or rewards, got {wants!r}; rename it.")
    scored = rewards.isfinite()
    if "scored" in parameters:
        settings["scored"] = scored
    values = standardize(rewards) if wants == "z" else torch.where(scored, rewards, torch.nan)
    result = aggregation(values, weights, **settings)
    expected = (*rewards.shape[:2], weights.shape[-2])
    if result.shape != expected:
        raise ValueError(f"the aggregation returned shape {tuple(result.shape)}, expected (P, G, S) = {expected}.")
    dropped = ~scored.any(dim=-1, keepdim=True)
    if wants == "rewards":
        dropped = dropped | (result.isnan() & ~scored.all(dim=-1, keepdim=True))
    result = torch.where(dropped, 0.0, result)
    if bool(result.isnan().any()):
        raise ValueError("the aggregation returned NaN for an image that was scored; it must return a number.")
    return result.clamp(-clamp, clamp)


def standardize(rewards: Tensor, eps: float = 1e-8, *, ddof: int = 1, eps_to: Placement = "std") -> Tensor:
    """Standard score of every reward within its group.

    Args:
        rewards: shape (P, G, K), raw units, higher is better; NaN marks an image a reward could not score.
        eps: added to the standard deviation, in reward units.
        ddof: the variance is divided by the number of images minus this; 1 is unbiased.
        eps_to: what eps is added to, if not to the standard deviation.

    Returns:
        Shape (P, G, K), unitless, mean 0 over the images of the group that the reward scored; 0 where it could not
        score, and for a group in which it scored fewer than two images. So is a group whose values differ by a few
        units in the last place: that is rounding, not reward. Computed in float64, so that no value overflows.

    Raises:
        ValueError: if G < 2, because a group of one has no spread, or for another eps_to.

    Source: Customized-GRPO, train_customized_grpo.py:645-653 (unbiased std, eps 1e-8).
    """
    check_shape(rewards, "P G K")
    if rewards.shape[1] < 2:
        raise ValueError(
            f"standardize needs G >= 2 generations per prompt, got {rewards.shape[1]}; raise num_generations."
        )
    return _standardize(rewards.double(), rewards.dtype, eps, ddof, eps_to)


def _standardize(
    values: Tensor, dtype: torch.dtype, eps: float = 1e-8, ddof: int = 1, eps_to: Placement = "std"
) -> Tensor:
    """`standardize` of float64 values that came of `dtype`: to its rounding, and back to it."""
    deviation, count = _deviations(values, dtype), values.isfinite().sum(dim=1, keepdim=True)
    variance = deviation.square().sum(dim=1, keepdim=True) / (count - ddof).clamp(min=1)
    return torch.where(deviation == 0, 0.0, deviation / _std(variance, eps, eps_to)).to(dtype)


def _deviations(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Difference of every value from the mean of its group.

    Args:
        values: shape (P, G, K) float64, NaN where not scored.
        dtype: that the values were computed in.

    Returns:
        Shape (P, G, K); 0 where not scored, and for a group whose values differ by a few units in the last place.
    """
    scored = values.isfinite()
    low, differs = _lowest(values, dtype)
    # From the group's lowest value up, so that the mean of a narrow group far from 0 keeps its digits.
    above = torch.where(scored, values - low, 0.0)
    mean = above.sum(dim=1, keepdim=True) / scored.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(scored & differs, above - mean, 0.0)


def _lowest(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The lowest value of each group, and whether the group differs by more than a few units in the last place."""
    scored = values.isfinite()
    low = torch.where(scored, values, torch.inf).amin(dim=1, keepdim=True)
    high = torch.where(scored, values, -torch.inf).amax(dim=1, keepdim=True)
    rounding = 8 * torch.finfo(dtype).eps * torch.maximum(low.abs(), high.abs())
    return low, high - low > rounding


def _std(variance: Tensor, eps: float, eps_to: Placement) -> Tensor:
    if eps_to == "std":
        return variance.sqrt() + eps
    if eps_to == "variance":
        return (variance + eps).sqrt()
    if eps_to == "floor":
        return variance.sqrt().clamp(min=eps)
    raise ValueError(f"expected eps_to std, variance or floor, got {eps_to!r}.")


def centred(advantages: Tensor, scored: Tensor | None = None) -> Tensor:
    """A minus the mean of its group, at each level. (P, G, S) to (P, G, S).

    `scored`: bool (P, G), whether any reward could score the image; None is everywhere. Other images take no part in
    the mean and get 0.
    """
    check_shape(advantages, "P G S")
    counted = torch.ones_like(advantages[..., :1]) if scored is None else scored.unsqueeze(-1).to(advantages)
    mean = (advantages * counted).sum(dim=1, keepdim=True) / counted.sum(dim=1, keepdim=True).clamp(min=1)
    return (advantages - mean) * counted


def normalized(
    advantages: Tensor, everyone: Tensor, scored: Tensor | None = None, *, ddof: int = 0, eps: float = 1e-4
) -> Tensor:
    """A / (std + eps), the standard deviation that of all values of the batch, levels included: one number.

    Args:
        advantages: any shape.
        everyone: shape (P, G, S), of all processes.
        scored: bool (P, G) beside `everyone`, whether any reward could score the image; None is everywhere.
        ddof: as in `standardize`.
        eps: in the units of `everyone`.

    Source: DiffusionNFT, stat_tracking.py, "global_std": raw rewards, `normalized(centred(rewards), rewards)`.
    """
    check_shape(everyone, "P G S")
    values = (everyone if scored is None else everyone[scored]).double()
    std = values.std(correction=ddof) if values.numel() > ddof else values.new_zeros(())
    return advantages / (std + eps)


def weighted_sum(z: Tensor, weights: Tensor) -> Tensor:
    """The baseline: sum_k weights[s, k] z[p, g, k]. Shapes as in `sars`.

    A reward that could not score an image adds nothing to its sum; the other weights stay as they are.
    """
    check_weights(weights)
    return z @ weights.mT


def sars(z: Tensor, weights: Tensor, *, gamma: float = 0.4) -> Tensor:
    """Weighted sum plus `gamma` times `synergy`.

    Args:
        z: shape (P, G, K); 0 where a reward could not score, which adds nothing and has no synergy.
        weights: shape (S, K), one row per trained step.
        gamma: strength of the synergy term, in standard scores.

    Returns:
        Shape (P, G, S).
    """
    return weighted_sum(z, weights) + gamma * synergy(z).unsqueeze(-1)


def synergy(z: Tensor) -> Tensor:
    """Agreement of the rewards on one image: +tanh|z_i z_j| if both are above the group mean, else -tanh|z_i z_j|.

    Args:
        z: shape (P, G, K), from `standardize`.

    Returns:
        Shape (P, G), in (-1, 1), the mean over the K(K-1)/2 pairs.

    Raises:
        ValueError: if K < 2, because a reward alone agrees with nothing.

    Source: paper SARS, two rewards. The mean over pairs for K > 2 is ours.
    """
    return _pair_synergy(z).mean(dim=-1)


def sars_recentred(z: Tensor, weights: Tensor, *, gamma: float = 0.4, scored: Tensor | None = None) -> Tensor:
    """`sars` with the bonus of each pair of rewards moved to mean 0 over the images of a group that both scored.

    As published the bonus has a negative mean, -0.16 at correlation -0.8: on average every sample is pushed away from,
    the better ones too, which is no preference between the images of a group. Shapes as in `sars`; an image that one
    of a pair could not score has no bonus of that pair. `scored`: bool (P, G, K); None is everywhere.

    Ours: what is left of the bonus is its order within the group.
    """
    bonus, both = _pair_synergy(z), _both(z, scored)
    mean = (bonus * both).sum(dim=1, keepdim=True) / both.sum(dim=1, keepdim=True).clamp(min=1)
    return weighted_sum(z, weights) + gamma * torch.where(both, bonus - mean, 0.0).mean(dim=-1, keepdim=True)


def sars_by_conflict(z: Tensor, weights: Tensor, *, gamma: float = 0.4, scored: Tensor | None = None) -> Tensor:
    """`sars_recentred` with gamma in proportion to the conflict measured in the batch.

    gamma holds at the share that unrelated rewards have, 1/2; it doubles where every image is in conflict and is 0
    where none is. The batch is all P * G rows given: hand in the rows of all processes. Shapes as in `sars_recentred`.

    Ours: shape the rewards only as much as they compete.
    """
    share = conflict_statistics(z, scored).conflict.nan_to_num()
    return sars_recentred(z, weights, gamma=2 * gamma * float(share), scored=scored)


def gdpo(
    rewards: Tensor,
    weights: Tensor,
    *,
    ddof: int = 1,
    group_eps: float = 1e-8,
    group_eps_to: Placement = "std",
    eps: float = 1e-8,
    eps_to: Placement = "std",
) -> Tensor:
    """Weighted sum of standard scores, standardized once more over the batch, so that its scale is always the same.

        z_k = (r_k - mean_group r_k) / (std_group r_k + group_eps)       q = sum_k w_k z_k
        A   = (q - mean_batch q) / (std_batch q + eps)

    The batch is all P * G rows given: hand in the rows of all processes, or the result depends on their number. An
    image that no reward could score takes no part in the statistics of the batch and gets 0.

    Args:
        rewards: shape (P, G, K), raw units. NaN where a reward could not score an image, which keeps its others.
        weights: shape (S, K), one row per trained step.
        ddof: of both standard deviations, as in `standardize`.
        group_eps, eps: of the first and of the second, in reward units and in standard scores.
        group_eps_to, eps_to: what they are added to.

    Source: GDPO (arXiv 2601.05242). The published codes, by their settings: NVlabs/GDPO's TRL and huggingface/trl
    group_eps=1e-4, eps=1e-4; NVlabs/GDPO's verl and verl group_eps=1e-6, eps=1e-8, eps_to="variance"; Flow-Factory
    ddof=0, group_eps=1e-6, group_eps_to="floor", eps=1e-6, eps_to="floor".
    """
    z = standardize(rewards, group_eps, ddof=ddof, eps_to=group_eps_to)
    total = _if_any(rewards.isfinite(), weighted_sum(z, weights), torch.nan)
    return standardize(total.flatten(0, 1).unsqueeze(0), eps, ddof=ddof, eps_to=eps_to).view_as(total)


def minimum(z: Tensor, weights: Tensor, *, scored: Tensor | None = None) -> Tensor:
    """The worst reward counts, of those that scored the image. The weights give only the number of steps.

    Shapes as in `sars`. `scored`: bool (P, G, K); None is everywhere. An image that no reward could score gets 0.
    """
    known = z if scored is None else z.masked_fill(~scored, torch.inf)
    return _if_any(scored, _every_step(known.amin(dim=-1), weights), 0.0)


def maximum(z: Tensor, weights: Tensor, *, scored: Tensor | None = None) -> Tensor:
    """The best reward counts, of those that scored the image. Otherwise as `minimum`."""
    return -minimum(-z, weights, scored=scored)


def harmonic(z: Tensor, weights: Tensor, *, gamma: float = 0.4, punish_conflict: bool = False) -> Tensor:
    """Weighted sum plus gamma z_i z_j / (z_i + z_j), the mean over pairs; 0 for a pair with an unscored reward.

    As released (the default) the bonus is positive for a conflict whose sum is negative, and without bound where the
    two cancel. With `punish_conflict` (ours) it is +-|z_i||z_j| / (|z_i| + |z_j|): the same where the signs agree,
    negative in every conflict, never larger than either. Shapes as in `sars`.

    Source: Customized-GRPO, train_customized_grpo.py, conflict_strategy "harmonic".
    """
    a, b = _pairs(z)
    if punish_conflict:
        bonus = _agreement(a, b) * (a * b).abs() / (a.abs() + b.abs() + 1e-6)
    else:
        bonus = a * b / (a + b + 1e-6)
    return weighted_sum(z, weights) + gamma * bonus.mean(dim=-1, keepdim=True)


def product(z: Tensor, weights: Tensor, *, scored: Tensor | None = None) -> Tensor:
    """prod_k softplus(z_k)^(K w_k), standardized within the group at every step. Shapes as in `sars`.

    A reward that could not score an image counts as average there, z_k = 0: its factor is softplus(0), not 1, which
    would be better than average. An image that no reward could score (`scored`, bool (P, G, K); None is everywhere)
    takes no part in the statistics of its group and gets 0.

    Source: Customized-GRPO, train_customized_grpo.py, conflict_strategy "product", which standardizes over a single
    image and so returns NaN.
    """
    powers = weights.shape[-1] * weighted_sum(torch.nn.functional.softplus(z).log(), weights)
    return standardize(_if_any(scored, powers.exp(), torch.nan))


def conflict_drop(z: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum, but 0 for an image on which two rewards disagree in sign: what is in conflict teaches nothing.

    Shapes as in `sars`. A reward that could not score an image disagrees with none.
    """
    a, b = _pairs(z)
    return torch.where((a * b < 0).any(dim=-1, keepdim=True), 0.0, weighted_sum(z, weights))


def raw_sum(rewards: Tensor, weights: Tensor) -> Tensor:
    """The field's practice: sum_k weights[s, k] rewards[p, g, k], standardized within the group. Large units win.

    Args:
        rewards: shape (P, G, K), raw units. An image with NaN in any column is dropped, because its sum is not known:
            it gets 0 and takes no part in its group's statistics.
        weights: shape (S, K), one row per trained step.

    Returns:
        Shape (P, G, S), in standard scores.
    """
    return _standardize(weighted_sum(rewards.double(), weights.double()), rewards.dtype)


def log_tamed(rewards: Tensor, weights: Tensor) -> Tensor:
    """As `raw_sum`, with sign(r) log(1 + |r|) in place of r, so that one outlier does not rule its group.

    Shapes as in `raw_sum`, which drops the same images. Not PaCo-GRPO's rule, which tames only the rewards whose
    coefficient of variation exceeds the mean of those of all rewards.
    """
    raw = rewards.double()
    return _standardize(weighted_sum(raw.sign() * raw.abs().log1p(), weights.double()), rewards.dtype)


def identity_gate(
    rewards: Tensor,
    weights: Tensor,
    *,
    threshold: float,
    strength: float,
    prompt: int = 0,
    identity: int = 1,
) -> Tensor:
    """r_prompt - strength * max(0, threshold - r_identity)^2, standardized within the group.

    Identity is a constraint to satisfy, not a reward to raise. The weights give only the number of steps; `prompt` and
    `identity` are columns, `threshold` is in raw units of the identity reward. Shapes as in `raw_sum`; an image with
    NaN in one of the two columns is dropped as there, and other columns do not matter.

    There are no defaults, because they depend on the scale of the rewards: DivRL has 0.5 and 5, in units of its own
    identity reward (arXiv 2606.23950).
    """
    raw = rewards.double()
    short = (threshold - raw[..., identity]).clamp(min=0)
    return _standardize(_every_step(raw[..., prompt] - strength * short**2, weights), rewards.dtype)


def cme(
    rewards: Tensor,
    weights: Tensor,
    *,
    execution: Sequence[int] = (0,),
    base: float = 0.6,
    zero: float | Sequence[float | None] | Tensor | None = None,
    one: float | Sequence[float] | Tensor = 1.0,
    copies: Tensor | None = None,
) -> Tensor:
    """Consistency-modulated execution: identity pays in proportion to how far the prompt was carried out.

        e, c = unit_rewards of the columns in `execution`, and of the others
        R    = prod_k e_k (1 - m + m sum_j w_j c_j / sum_j w_j),   standardized within the group
        m    = (1 - base) mean_j w_j / mean_k w_k,   at most 1

    An unedited copy of the reference has e = 0 and so R = 0, however consistent it is. Equal weights give the published
    R = e (base + (1 - base) c). With others, a = 1 - m follows the weights: where they favour the prompt, identity
    modulates less. Shapes as in `raw_sum`; an image with NaN in any column is dropped as there.

    Args:
        rewards, weights: as in `raw_sum`.
        execution: columns of the rewards that say whether the prompt was carried out.
        base: a, the part of e that is paid without any consistency.
        zero, one: as in `unit_rewards`. For an execution reward, what an unedited copy of the reference scores for the
            prompt, and what a real image does. A zero that is None is taken from `copies`; that of other rewards is 0.
        copies: shape (P, 1, K), what an unedited copy of the reference scores for each example. Such a zero stays a
            tenth of its one below it, because a prompt may ask for nothing new. Where a copy could not be scored, the
            zero is the mean of the others.

    Raises:
        ValueError: if the execution rewards are none or all of the rewards, a zero is neither given nor measured, or as
            in `unit_rewards`.

    Source: FIRM (arXiv 2603.12247), table 5. More than one execution reward, or consistency reward, and the weights are
    ours.
    """
    check_shape(rewards, "P G K")
    check_weights(weights)
    columns = range(rewards.shape[-1])
    chosen = sorted({columns[k] for k in execution})
    others = [k for k in columns if k not in chosen]
    if not chosen or not others:
        raise ValueError(
            f"cme needs execution rewards and other rewards, got columns {chosen} of {len(columns)} as execution."
        )
    raw, weights = rewards.double(), weights.double()
    low, differs = _lowest(raw, rewards.dtype)
    # Rounding is no reward, but the ends may magnify it.
    zero = zero if isinstance(zero, Tensor) else _zeros(zero, one, chosen, len(columns), copies)
    unit = unit_rewards(torch.where(differs | raw.isnan(), raw, low), zero, one)
    consistent = weights[..., others]
    pull = ((1 - base) * consistent.mean(dim=-1) / weights.mean(dim=-1)).clamp(max=1).unsqueeze(-2)
    share = consistent / consistent.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    modulation = 1 - pull + pull * weighted_sum(unit[..., others], share)
    return _standardize(unit[..., chosen].prod(dim=-1, keepdim=True) * modulation, rewards.dtype)


def _zeros(
    given: float | Sequence[float | None] | None, one: Any, execution: Sequence[int], count: int, copies: Tensor | None
) -> Tensor:
    """(K,) or (P, 1, K) the zeros of `cme`, those that are not given taken from `copies`."""
    known = list(given) if isinstance(given, Sequence) else [given] * count
    missing = [k for k in execution if known[k] is None]
    zero = torch.tensor([0.0 if value is None else value for value in known], dtype=torch.float64)
    if not missing:
        return zero
    if copies is None:
        raise ValueError("cme needs the zero of an execution reward: give zero, or copies to measure it.")
    high = torch.as_tensor(one, dtype=torch.float64)
    measured = torch.where(copies.isnan(), copies.nanmean(dim=0), copies).nan_to_num().double()
    measured = torch.minimum(measured, high - (0.1 * high.abs()).clamp(min=1e-3))
    return torch.where(torch.tensor([k in missing for k in range(count)]), measured, zero)


def unit_rewards(
    rewards: Tensor, zero: float | Sequence[float] | Tensor = 0.0, one: float | Sequence[float] | Tensor = 1.0
) -> Tensor:
    """clip((r - zero) / (one - zero), 0, 1): raw units to [0, 1], NaN stays. (P, G, K) to (P, G, K).

    Args:
        rewards: shape (P, G, K), raw units.
        zero, one: the raw values that become 0 and 1: one number, K of them, or a tensor that broadcasts to (P, G, K),
            such as (P, 1, K) with values of each example.

    Raises:
        ValueError: if a one is not above its zero.
    """
    low, high = (torch.as_tensor(end, dtype=rewards.dtype, device=rewards.device) for end in (zero, one))
    if not bool((high > low).all()):
        raise ValueError(f"expected every one above its zero, got zero={zero} and one={one}.")
    return ((rewards - low) / (high - low)).clamp(0, 1)


def difficulty_weights(rewards: Tensor, *, power: float = 2.0, low: float = 0.5, high: float = 5.0) -> Tensor:
    """clip((1 - mean_group r)^power, low, high), divided by their mean over the batch: weights of groups. (P,).

    Multiply the advantages of a group by its weight: prompts that the policy still fails count more. The batch is all
    P groups given: hand in the rows of all processes.

    Args:
        rewards: shape (P, G), in [0, 1]; NaN marks an image that could not be scored. A group without any other weighs
            1 and takes no part in the mean.
        power: 0 weighs all groups alike.
        low, high: bounds before the division. Rewards in [0, 1] never reach an upper bound above 1.

    Source: difficulty-aware reweighting (DAR).
    """
    check_shape(rewards, "P G")
    weights = ((1 - rewards.nanmean(dim=1)) ** power).clamp(low, high)
    return (weights / weights.nanmean()).nan_to_num(nan=1.0)


class ConflictStatistics(NamedTuple):
    """Scalars, mean over pairs of rewards; NaN without any group. Exactly average images count in no share."""

    conflict: Tensor
    """Share of images on which two rewards have opposite signs."""
    both_positive: Tensor
    both_negative: Tensor
    correlation: Tensor
    """Within groups, mean over groups."""


def conflict_statistics(z: Tensor, scored: Tensor | None = None) -> ConflictStatistics:
    """How much the rewards disagree.

    Args:
        z: shape (P, G, K), from `standardize`. A group in which one of two rewards has no spread does not count.
        scored: bool (P, G, K); None is everywhere. An image counts for the pairs of rewards that both scored it.
    """
    both = _both(z, scored)
    # The images that both scored have a mean and a spread of their own.
    u, v = (standardize(x.masked_fill(~both, torch.nan)) for x in _pairs(z))
    spread = (u != 0).any(dim=1, keepdim=True) & (v != 0).any(dim=1, keepdim=True)
    a, b = _pairs(z)
    counted = both & spread

    def share(which: Tensor) -> Tensor:
        return ((which & counted).sum(dim=(0, 1)) / counted.sum(dim=(0, 1))).nanmean()

    norm = ((u**2).sum(dim=1) * (v**2).sum(dim=1)).sqrt()
    correlation = torch.where(spread[:, 0], (u * v).sum(dim=1) / norm, torch.nan).nanmean()
    return ConflictStatistics(share(a * b < 0), share((a > 0) & (b > 0)), share((a < 0) & (b < 0)), correlation)


def group_variance(rewards: Tensor) -> Tensor:
    """Unbiased variance of each reward within each group. (P, G, K) to (P, K), float64.

    Its mean over groups is the mean square within groups of a one-way analysis of variance. NaN for a group with fewer
    than two scored images.
    """
    count = rewards.isfinite().sum(dim=1)
    variance = _deviations(rewards.double(), rewards.dtype).square().sum(dim=1) / (count - 1).clamp(min=1)
    return torch.where(count >= 2, variance, torch.nan)


def group_correlation(rewards: Tensor) -> Tensor:
    """Correlation of the first two rewards within each group. (P, G, K) to (P,), float64.

    NaN for a group in which one of them does not vary.
    """
    pair = rewards[..., :2]
    pair = pair.masked_fill(~pair.isfinite().all(dim=-1, keepdim=True), torch.nan)
    a, b = _deviations(pair.double(), pair.dtype).unbind(dim=-1)
    norm = (a.square().sum(dim=1) * b.square().sum(dim=1)).sqrt()
    return torch.where(norm > 0, (a * b).sum(dim=1) / norm, torch.nan)


def check_shape(x: Tensor, axes: str) -> None:
    """Raise ValueError unless `x` has one dimension per name in `axes`."""
    names = axes.split()
    if x.ndim != len(names):
        raise ValueError(f"expected shape ({', '.join(names)}), got {tuple(x.shape)}")


def check_weights(weights: Tensor) -> None:
    """Raise ValueError unless the shape is (S, K) or (P, S, K)."""
    check_shape(weights, "P S K" if weights.ndim == 3 else "S K")


def _pairs(z: Tensor) -> tuple[Tensor, Tensor]:
    """Both columns of every pair of rewards, each (P, G, K(K-1)/2)."""
    check_shape(z, "P G K")
    if z.shape[-1] < 2:
        raise ValueError(f"agreement needs K >= 2 rewards, got {z.shape[-1]}; use weighted_sum for one reward.")
    i, j = torch.triu_indices(z.shape[-1], z.shape[-1], offset=1, device=z.device)
    return z[..., i], z[..., j]


def _both(z: Tensor, scored: Tensor | None) -> Tensor:
    """Where both rewards of a pair scored the image: bool (P, G, K(K-1)/2)."""
    i, j = _pairs(torch.ones_like(z, dtype=torch.bool) if scored is None else scored)
    return i & j


def _if_any(scored: Tensor | None, value: Tensor, otherwise: float) -> Tensor:
    """(P, G, S), with `otherwise` for the images that no reward could score."""
    return value if scored is None else torch.where(scored.any(dim=-1, keepdim=True), value, otherwise)


def _pair_synergy(z: Tensor) -> Tensor:
    a, b = _pairs(z)
    return _agreement(a, b) * (a * b).abs().tanh()


def _agreement(a: Tensor, b: Tensor) -> Tensor:
    """+1 where both are above the group mean, else -1."""
    return torch.where(torch.minimum(a, b) > 0, 1.0, -1.0).to(a)


def _every_step(value: Tensor, weights: Tensor) -> Tensor:
    """(P, G) to (P, G, S)."""
    check_weights(weights)
    return value.unsqueeze(-1).expand(-1, -1, weights.shape[-2])
