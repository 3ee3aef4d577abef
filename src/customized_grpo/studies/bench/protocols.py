"""The field's benchmarks as small data: what is asked, how pictures are drawn, what is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from customized_grpo.errors import UserError, nearest
from customized_grpo.settings import Spec

Role = Literal["identity", "prompt", "copy"]
"""identity is held against real photos; prompt is not; copy is alike where it should not be: lower is better."""


def _spec(use: str, **arguments: Any) -> Spec:
    return Spec(use=use, **arguments)


@dataclass(frozen=True)
class Metric:
    """One column of scores."""

    role: Role
    spec: Spec
    """A reward: the same code that training uses."""
    title: str


DINO = Metric("identity", _spec("DinoReward", path="facebook/dino-vits16", segment=False), "DINO")
DINOV2 = Metric("identity", _spec("DinoReward", path="facebook/dinov2-base", segment=False), "DINOv2")
CLIP_I = Metric("identity", _spec("ClipImageReward", path="openai/clip-vit-base-patch32", segment=False), "CLIP-I")
CLIP_T = Metric("prompt", _spec("ClipReward", path="openai/clip-vit-base-patch32"), "CLIP-T")
HPSV3 = Metric("prompt", _spec("Hpsv3Reward"), "HPSv3")
BACKGROUND = Metric("copy", _spec("customized_grpo.rewards.copying:BackgroundCopied"), "background copied")
DREAMBOOTH_METRICS = {"dino": DINO, "clip_i": CLIP_I, "clip_t": CLIP_T, "background_copied": BACKGROUND}


@dataclass(frozen=True)
class Protocol:
    """A benchmark. What is None is left to the configuration of the policy."""

    name: str
    about: str
    """What it is and who wrote it, in a sentence."""
    source: str
    suite: Literal["dreambooth", "file", "dreambench++", "toyworld"]
    """Where its tasks come from; see `suites.open_suite`."""
    images: int
    """Drawn for each prompt."""
    metrics: Mapping[str, Metric]
    references: int = 1
    """Subjects in a prompt."""
    seed: int = 0
    num_inference_steps: int | None = None
    policy: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings that it wants of the policy."""
    guidance: float | None = None
    """Its guidance, by whichever setting the model has for it; see `guidance.guidance_setting`."""
    notes: tuple[str, ...] = ()
    """Rules that the other fields do not say."""
    subjects: int | None = None
    prompts: int | None = None
    """How many of each it has when it is complete; prompts for one subject."""


_OURS = "The noise is a function of seed, task and image: two benches pair picture by picture, whatever drew them."
_REFERENCE = "The policy sees one photo of the subject, the first by name; a policy tuned per subject would see all."

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="dreambooth",
            about="DreamBench as DreamBooth measured it: identity against all real photos of the subject.",
            source="Ruiz et al. 2023, DreamBooth, sec. 4.2; github.com/google/dreambooth",
            suite="dreambooth", images=4, subjects=30, prompts=25, metrics=DREAMBOOTH_METRICS,
            notes=(
                _REFERENCE,
                "DINO and CLIP-I: mean cosine with every real photo of the subject, backgrounds included.",
                "Prompts without the unique token, as for all methods that are not tuned on each subject.",
            ),
        ),
        Protocol(
            name="uno",
            about="DreamBench with one fixed reference photo of each subject, as a list of prompts and photos says.",
            source="Wu et al. 2025, UNO, arXiv 2504.02160; the list comes with your data",
            suite="file", images=4, subjects=30, prompts=25, metrics=DREAMBOOTH_METRICS,
            notes=(
                "DINO and CLIP-I: cosine with the one photo that the policy saw, background included.",
                "The list says prompts and photos, not how many images are drawn for a prompt: four is ours.",
            ),
        ),
        Protocol(
            name="uno-multi",
            about="Two subjects of DreamBench in one picture, as a list of prompts and pairs of photos says.",
            source="Wu et al. 2025, UNO, arXiv 2504.02160; the list comes with your data",
            suite="file", images=4, references=2, subjects=30, prompts=25, metrics=DREAMBOOTH_METRICS,
            notes=(
                "DINO and CLIP-I: mean cosine of the picture with the two photos that the policy saw.",
                "The oracle line is of photos of one subject alone: a picture of two is not expected to reach it.",
                "Intervals resample pairs; a subject that is in several pairs makes them a little too narrow.",
            ),
        ),
        Protocol(
            name="customized-grpo",
            about="DreamBench with the settings of Customized-GRPO: one picture for each prompt, 512 x 512, 25 steps.",
            source="Customized-GRPO, arXiv 2510.18263",
            suite="dreambooth", images=1, subjects=30, prompts=25, seed=3407, num_inference_steps=25,
            policy={"resolution": 512}, guidance=4.0,
            metrics={
                "dino": DINO, "dinov2": DINOV2, "clip_i": CLIP_I, "clip_t": CLIP_T, "hpsv3": HPSV3,
                "background_copied": BACKGROUND,
            },
            notes=(
                _REFERENCE + " With prompts=FILE it is the photo that the list names.",
                "DINO, DINOv2 and CLIP-I: cosine with the one photo that the policy saw, background included.",
                "The paper does not say which photo it shows; its seed is ours too, its noise is not.",
            ),
        ),
        Protocol(
            name="dreambench++",
            about="DreamBench++: 150 pictures, nine prompts each, graded by a vision-language model.",
            source="Peng et al. 2024, DreamBench++; github.com/yuangpeng/dreambench_plus",
            suite="dreambench++", images=1, subjects=150, prompts=9,
            metrics={
                "concept": Metric("identity", _spec("VlmJudge", rubric="identity", segment=False), "concept"),
                "prompt": Metric("prompt", _spec("VlmJudge", rubric="prompt"), "prompt"),
                "dino": DINO, "clip_i": CLIP_I, "clip_t": CLIP_T, "background_copied": BACKGROUND,
            },
            notes=(
                "The judge grades 0 to 4 by rubrics of ours, and is the model you name: not comparable with the "
                "published grades, which are GPT-4o's by the authors' rubrics.",
                "DINO is another model than the authors': theirs is dino_vits8 of torch.hub on images resized to 256 "
                "(bicubic) and cropped to 224; their DINO scores do not compare with ours.",
                "There is one picture of each subject, so there is no oracle line.",
            ),
        ),
        Protocol(
            name="toyworld",
            about="The embedded toy world: unseen creatures, unseen combinations, and an oracle that knows the truth.",
            source="docs/toyworld.md",
            suite="toyworld", images=2, subjects=40, prompts=4, seed=3407,
            metrics={
                "identity": Metric("identity", _spec("DinoReward", path="toyworld:dino"), "identity"),
                "prompt": Metric("prompt", _spec("ClipReward", path="toyworld:clip"), "prompt"),
                "oracle_subject": Metric(
                    "identity", _spec("customized_grpo.toyworld.oracle:SubjectKept"), "subject kept"
                ),
                "oracle_prompt": Metric("prompt", _spec("customized_grpo.toyworld.oracle:PromptShown"), "prompt shown"),
                "background_copied": BACKGROUND,
            },
            notes=(
                "Tasks of the held-out split from the protocol's seed: no evaluation during training sees them.",
                "The oracle line is of the true drawings of the very scenes that the prompts ask for.",
            ),
        ),
    )
}  # fmt: skip
COMMON_NOTES = (_OURS, "Scores are of the PNG files: what is measured is what was saved.")


def find_protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises:
        UserError: if there is none, with the nearest there is.
    """
    if name not in PROTOCOLS:
        raise UserError(f"There is no protocol '{name}'; there are {', '.join(PROTOCOLS)}.{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]
