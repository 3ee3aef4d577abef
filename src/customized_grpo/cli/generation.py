"""Generate and evaluate images with trained weights: `cgrpo generate` and `cgrpo eval`."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from customized_grpo.assemble import PolicySource, build_policy, build_rewards, held_out_examples, load_trained
from customized_grpo.cli.display import show_scores, show_verdict
from customized_grpo.data.decode import read_picture
from customized_grpo.data.images import to_pil
from customized_grpo.errors import UserError
from customized_grpo.policies.contract import Policy, repeat
from customized_grpo.randomness import normal
from customized_grpo.settings import Spec
from customized_grpo.sources import PACKAGED
from customized_grpo.store import check_place, is_file
from customized_grpo.store.run import RunFolder
from customized_grpo.store.scores import Scores, write_scores
from customized_grpo.structures import Example
from customized_grpo.studies.report.verdict import Verdict
from customized_grpo.toyworld.dataset import ToyExample, toy_reference
from customized_grpo.toyworld.world import VOCABULARY, unknown_words
from customized_grpo.train import evaluation as evaluations
from customized_grpo.train.grids import grid, save_grid
from customized_grpo.train.rollout import sample_ode
from customized_grpo.train.settings import TrainerConfig


def reference_example(reference: Path | None, prompt: str | None, seed: int) -> Example:
    """An example with the user's image and prompt; without an image, a toy subject.

    Raises:
        UserError: if an image is given without a prompt, or does not exist.
    """
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt is empty; give a description of the image.")
    if reference is None:
        example = toy_reference(seed)
        return replace(example, prompt=prompt) if prompt else example
    if not is_file(reference):
        raise UserError(f"The image '{str(reference)[:100]}' does not exist; set --reference to an image file.")
    if prompt is None:
        raise UserError('--reference requires a --prompt, such as --prompt "a cat on the beach".')
    picture, mask = read_picture(reference)
    return Example(reference.stem, prompt, (picture,), masks=(mask,) if mask else ())


def warn_of_toy_model(policy: Spec, example: Example) -> None:
    """Warn of words and photos that the embedded model was not trained on, if the policy is that model."""
    if not str(policy.arguments.get("path", "")).startswith(PACKAGED):
        return
    if unknown := unknown_words(example.prompt):
        warnings.warn(
            f"The embedded toy model does not know {', '.join(map(repr, unknown))} and ignores what it does not know; "
            f"its words are {', '.join(VOCABULARY)}.",
            stacklevel=1,
        )
    if not isinstance(example, ToyExample):
        warnings.warn(
            "The embedded toy model was trained on drawings of its toy world alone and turns a photo into blobs; "
            "leave out --reference, or train a model of photos, such as that of the recipe kontext.",
            stacklevel=1,
        )


@torch.no_grad()
def generate(
    policy: Policy, example: Example, load: Callable[[], int], count: int, seed: int, config: TrainerConfig
) -> Image.Image:
    """One row per noise: reference | base | trained. `load` loads the trained weights into the policy."""
    settings = config.evaluation
    with policy.sampled_with(**settings.of_policy()):
        conditioning = repeat(policy.encode([example]), count)
        noise = normal(policy.latent_shape(conditioning), [("generate", seed, i) for i in range(count)])
        base = sample_ode(policy, conditioning, noise, config.evaluation_steps, settings.solver)
        iteration = load()
        tuned = sample_ode(policy, conditioning, noise, config.evaluation_steps, settings.solver)
    rows = [[*example.references, to_pil(a), to_pil(b)] for a, b in zip(base, tuned, strict=True)]
    headers = ["reference"] * len(example.references) + ["base", f"iteration {iteration}"]
    return grid(rows, headers, [example.prompt] * count)


def new_file(folder: Path, wanted: Path | None) -> Path:
    """The path of a new image file.

    Raises:
        UserError: if the wanted file exists or cannot be made, or its suffix is not that of an image format.
    """
    if wanted is None:
        return next(path for i in range(10**6) if not (path := folder / f"{i:04d}.png").exists())
    if not wanted.name:
        raise UserError("--output names no file; give one such as sheet.png.")
    check_place(wanted)
    if wanted.is_dir() or (wanted if wanted.suffix else wanted.with_suffix(".png")).exists():
        raise UserError(f"'{wanted}' already exists; choose another --output.")
    if wanted.suffix and wanted.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--output '{wanted}' ends in '{wanted.suffix}', which is not an image format; use .png.")
    return wanted if wanted.suffix else wanted.with_suffix(".png")


def evaluate_source(console: Console, source: PolicySource, output: Path | None) -> None:
    """Evaluate the base model of a configuration, and a checkpoint of a run if one is given."""
    config = source.config
    if output is not None:
        check_place(output)
        if is_file(output):
            raise UserError(f"The output '{output}' is a file; choose a folder as --output.")
        if not RunFolder(output).is_empty():
            raise UserError(f"The folder '{output}' is not empty; choose another --output.")
    examples = held_out_examples(config)
    if not examples:
        raise UserError("There is nothing to evaluate: evaluation.examples is 0; set it to 1 or more.")
    rewards, metrics = build_rewards(config.rewards), build_rewards(config.metrics, "metric")
    policy, steps = build_policy(config), config.evaluation_steps

    def measure(step: int) -> Scores:
        result = evaluations.evaluate(policy, examples, rewards, metrics, config.evaluation, steps, step)
        show_scores(console, "base" if step == 0 else f"iteration {step}", result.scores)
        if output is not None:
            write_scores(output / f"iteration-{step:06d}.json", result.scores)
            save_grid(result, output)
        return result.scores

    base = measure(0)
    if source.run is not None:
        after = measure(load_trained(policy, source.run, source.iteration))
        show_verdict(console, Verdict(base, after))
    if output is not None:
        console.print(f"scores and images: {output}", soft_wrap=True)
