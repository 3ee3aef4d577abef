"""Export an adapter with a script that uses it and a model card: `cgrpo export`."""

import inspect
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console

from customized_grpo import policies
from customized_grpo._version import __version__
from customized_grpo.config import Config
from customized_grpo.errors import UserError
from customized_grpo.policies.export import Format, check_output, export_adapter
from customized_grpo.policies.settings import LoraSettings
from customized_grpo.settings.build import resolve
from customized_grpo.shell import program
from customized_grpo.sources import PACKAGED
from customized_grpo.store import write
from customized_grpo.store.run import RunFolder
from customized_grpo.store.scores import read_scores
from customized_grpo.store.yaml_text import dump_yaml
from customized_grpo.studies.report.verdict import Verdict, kind_name
from customized_grpo.train.checkpoint import iteration_of, verify

CARD, SCRIPT = "README.md", "use.py"
TAGS = ["lora", "subject-driven-generation", "reinforcement-learning", "customized-grpo"]
FLUX2 = (
    "With its own defaults the pipeline draws in the size of the reference, shrinks references beyond 1024 x 1024 "
    "pixels only, and takes {}."
)
DIFFERENCES = {
    "FluxKontextPolicy": "With its own defaults the pipeline moves image and reference to about 1024 x 1024 pixels, "
    "and takes 28 steps.",
    "Flux2KleinPolicy": FLUX2.format("50 steps with guidance 4"),
    "Flux2KleinKVPolicy": FLUX2.format("4 steps"),
    "Flux2DevPolicy": FLUX2.format("50 steps with guidance 4"),
    "QwenImageEditPolicy": "With its own defaults the pipeline moves image and references to about 1024 x 1024 pixels, "
    "takes 50 steps, and has no guidance unless a negative prompt is given, even an empty one.",
}
"""Families with a template of a script that needs diffusers alone, and what the script sets."""
PACKAGE = "No pipeline of diffusers does the same with these settings, so the script needs customized-grpo."


def export_checkpoint(
    console: Console, run: RunFolder, config: Config, found: Path, output: Path, format: Format, push: str | None
) -> None:
    """Write the adapter, and in diffusers' format its card and script beside it. `push` is a repository of the hub."""
    verify(found, lambda name: name.startswith("adapter/"))
    target = resolve(config.policy.use, "policy")
    pipeline = target.PIPELINE if inspect.isclass(target) and issubclass(target, policies.PipelinePolicy) else ""
    described = format == "diffusers" and pipeline != ""
    if push and not described:
        raise UserError("--push takes the adapter of a pipeline in the format diffusers; leave out --push or --format.")
    hub = _log_in() if push else None
    place = check_output(output)
    prefix = _free_prefix(place) if described else ""
    texts = _documents(run, config, target, found, place.name, prefix) if described else {}
    written = export_adapter(found / "adapter", output, format, pipeline=pipeline)
    console.print(f"{written}  ({found.name})", soft_wrap=True)
    if not described:
        console.print(
            f"There is no {CARD} or {SCRIPT}: they are written for pipelines in the format diffusers alone.",
            soft_wrap=True,
        )
        return
    for name, text in texts.items():
        console.print(str(write(place.with_name(prefix + name), text, new=True)), soft_wrap=True)
    if prefix:
        console.print(
            f"'{place.parent}' has a {CARD} or {SCRIPT} already, which was kept, hence the longer names.",
            soft_wrap=True,
        )
    console.print(f"Use {prefix}{SCRIPT}. {_differences(_template(config, target))}", soft_wrap=True)
    if push:
        texts = _documents(run, config, target, found, place.name)
        files = {place.name: written, **{name: text.encode() for name, text in texts.items()}}
        console.print(_push(hub, push, files), soft_wrap=True)


def _free_prefix(output: Path) -> str:
    """What the names of card and script begin with: nothing, or the name of the adapter where one of them is taken."""
    for prefix in ("", f"{output.stem}-"):
        taken = [path for name in (CARD, SCRIPT) if (path := output.with_name(prefix + name)).exists()]
        if not taken:
            return prefix
    raise UserError(f"'{taken[0]}' is already there; nothing was overwritten. Give another name.")


def _documents(
    run: RunFolder, config: Config, target: Any, checkpoint: Path, adapter: str, prefix: str = ""
) -> dict[str, str]:
    """Card and script by their names on the hub; with `prefix` the card tells of the script's name here."""
    template, values = _template(config, target), {"adapter": adapter, **_usage(config, target)}
    script = _environment(repr).get_template(f"{template}.py.jinja").render(values)
    return {CARD: _card(run, config, checkpoint, prefix + SCRIPT, _differences(template), values), SCRIPT: script}


# ---- the script


def _template(config: Config, target: Any) -> str:
    """The family whose own pipeline draws the same, or "package"."""
    arguments = config.policy.arguments
    own = target.__name__ in DIFFERENCES and target is getattr(policies, target.__name__)
    plain = arguments.get("quantize", "none") == "none" and config.evaluation.solver == "euler"
    packaged = str(arguments.get("path", PACKAGED)).startswith(PACKAGED)
    beyond = target.__name__.startswith("Flux2") and (arguments.get("reference_resolution") or 0) > 1024
    return target.__name__ if own and plain and not packaged and not beyond else "package"


def _differences(template: str) -> str:
    return DIFFERENCES.get(template, PACKAGE)


def _usage(config: Config, target: Any) -> dict[str, Any]:
    """The settings of evaluated and generated images, as plain data."""
    parameters = inspect.signature(policies.PipelinePolicy.__init__).parameters
    given, sampled = config.policy.arguments, config.evaluation.of_policy()
    settings = {name: given.get(name, parameter.default) for name, parameter in parameters.items()}
    width, height, resolution = (settings[name] for name in ("width", "height", "resolution"))
    size = (width, height) if width and not sampled["resolution"] else None
    guidance, true_cfg = (
        settings[name] if sampled[name] is None else sampled[name] for name in ("guidance_scale", "true_cfg_scale")
    )
    return {
        **settings,
        "path": given.get("path", config.policy.use),
        "revision": given.get("revision"),
        "dtype": str(settings["dtype"]).removeprefix("torch."),
        "steps": config.evaluation_steps,
        "solver": config.evaluation.solver,
        "size": size,
        "resolution": sampled["resolution"] or (round((width * height) ** 0.5) if size else resolution),
        "leading": -1 if target.__name__ == "QwenImageEditPolicy" else 0,
        "guidance_scale": target.GUIDANCE if guidance is None else guidance,
        "true_cfg_scale": true_cfg,
        "policy": {"use": config.policy.use, **{name: value for name, value in given.items() if name != "device"}},
        "sampled": sampled,
    }


def _environment(finalize: Any) -> Environment:
    """Every value in a template passes `finalize`, so that no setting can become code or markup."""
    return Environment(
        loader=PackageLoader("customized_grpo.cli"), finalize=finalize, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


# ---- the card


def _card(
    run: RunFolder, config: Config, checkpoint: Path, script: str, differences: str, values: Mapping[str, Any]
) -> str:
    base, iteration = str(values["path"]), iteration_of(checkpoint)
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "image-to-image", "tags": TAGS}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        front |= {"base_model": base, "base_model_relation": "adapter"}
    sides = values["size"] or [values["resolution"]] * 2
    template = _environment(_code).get_template("card.md.jinja")
    text = template.render(
        config=config,
        values=values,
        script=script,
        version=Markup(__version__),
        differences=Markup(differences),
        iteration=iteration,
        pixels=" x ".join(map(str, sides)) if all(sides) else None,
        rank=LoraSettings.model_validate(values["lora"] or {}).rank,
        evaluation=_evaluation(run, iteration),
        plain=Markup,
    )
    return f"---\n{dump_yaml(front)}---\n\n{text}"


def _evaluation(run: RunFolder, iteration: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of all tasks and of each kind, the change of every metric in words, with a star if it was not trained on."""
    with suppress(OSError, ValueError):  # not evaluated, or damaged
        verdict = Verdict(read_scores(run.evaluation(0)), read_scores(run.evaluation(iteration)))
        parts = {"all": verdict.changes, **{kind_name(kind): some for kind, some in verdict.by_kind.items()}}
        return [
            (kind, [(verdict.told(c), "" if c in verdict.trained else "*") for c in changes if c.tasks])
            for kind, changes in parts.items()
        ]
    return []


def _code(value: Any) -> str:
    """A value as code of one line, which no text can leave."""
    return value if isinstance(value, Markup) else f"`{' '.join(str(value).split()).replace('`', chr(39))}`"


# ---- the hub


def _log_in() -> Any:
    """The hub, where the user is logged in."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(
            f"--push needs the package huggingface_hub; {program('pip')} install huggingface_hub."
        ) from error
    hub = HfApi()
    try:
        hub.whoami()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--push could not log in to the hub ({_reason(error)}); log in with `{program('hf')} auth login` or set "
            f"HF_TOKEN. Nothing was written."
        ) from error
    return hub


def _push(hub: Any, repository: str, files: Mapping[str, Path | bytes]) -> str:
    """Upload files to a repository, which is made, and private, if there is none. Returns its address."""
    from huggingface_hub import CommitOperationAdd

    try:
        address = hub.create_repo(repository, private=True, exist_ok=True)
        there = sorted(files.keys() & set(hub.list_repo_files(repository)))
        if there:
            raise FileExistsError(f"it holds {there[0]} already")
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        hub.create_commit(repository, operations, commit_message="Adapter, script and card")
    except (OSError, ValueError) as error:
        raise UserError(
            f"The export is written, but could not be pushed to '{repository}' ({_reason(error)}); name another "
            f"repository, or upload the files with `{program('hf')} upload`."
        ) from error
    return str(address)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
