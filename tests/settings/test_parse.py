from pathlib import Path

import pytest

from customized_grpo.config import Config, check_names, load_config
from customized_grpo.errors import UserError
from customized_grpo.settings import Spec, recipes
from customized_grpo.settings.parse import read_tree, to_yaml
from customized_grpo.train.settings import EvaluationSettings, RolloutSettings, TrainerConfig

RECIPES = sorted(recipes.RECIPES.rglob("*.yaml"))


def test_the_defaults_are_valid_and_name_what_exists() -> None:
    check_names(load_config())


def test_a_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_config(None, ["seed=3", "method.advantage.gamma=0.1", "rollout.steps.use=all_steps"])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config


GRPO_ALONE = {
    "method.ratio_norm": "true", "rollout.dynamics": "cps", "rollout.dynamics.noise_level": "0.5",
    "rollout.steps": "all_steps", "training.old_log_probs": "recompute", "rollout.share_initial_noise": "true",
}  # fmt: skip


@pytest.mark.parametrize("objective", ["grpo", "nft", "awm", "{use: grpo, divergence_threshold: 1e-5}"])
def test_one_word_changes_the_objective_and_what_depends_on_it(tmp_path: Path, objective: str) -> None:
    config = load_config(None, [f"objective={objective}"])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert config.resolved() == config
    rollout, lr = config.rollout, config.training.optimizer.arguments["lr"]
    if "grpo" in objective:
        assert (rollout.dynamics.use, rollout.share_initial_noise, lr) == ("flow_sde", True, 1.5e-4)
        assert config.method.clip_range == (1e-3 if objective == "grpo" else None)
    else:
        assert (rollout.dynamics, rollout.steps, rollout.share_initial_noise, lr) == (None, None, False, 3e-4)
        assert config.objective.arguments["advantage_clip"] == 1.25
        assert config.method.clip_range == (1.0 if objective == "awm" else None)
    assert config.evaluation.num_inference_steps == rollout.num_inference_steps == 10


def test_only_what_is_written_is_refused_when_it_means_nothing_with_the_objective() -> None:
    for use in ("nft", "awm"):
        for setting, value in GRPO_ALONE.items():
            name = setting.removesuffix(".noise_level")
            with pytest.raises(UserError, match=rf"{name} is .*, which means nothing with the objective {use}; remove"):
                load_config(None, [f"objective={use}", f"{setting}={value}"])
            load_config(None, [f"objective={use}", f"{name}=null"])
        load_config(None, [f"objective={use}", "rollout.share_initial_noise=false"])
    load_config(None, ["objective=awm", "method.clip_range=0.5"])
    for words in (["objective=nft"], ["objective.divergence_threshold=1e-5"]):
        with pytest.raises(UserError, match=r"method.clip_range is 0.5, which means nothing with"):
            load_config(None, [*words, "method.clip_range=0.5"])
    own = load_config(None, ["objective=mine:Own", "rollout.dynamics=cps"])
    assert (own.rollout.dynamics.use, own.training.optimizer.arguments["lr"]) == ("cps", 3e-4)


def test_written_values_stay_and_arguments_are_merged_with_what_null_means() -> None:
    config = load_config(None, ["rollout.dynamics.noise_level=0.2", "rollout.steps=all_steps"])
    assert config.rollout.dynamics.model_dump() == {"use": "flow_sde", "noise_level": 0.2}
    assert config.rollout.steps.model_dump() == {"use": "all_steps"}
    words = ["objective={use: nft, normalize: batch}", "training.optimizer.lr=1e-3"]
    config = load_config(None, [*words, "evaluation.num_inference_steps=20"])
    assert config.objective.arguments["advantage_clip"] == 1.8
    assert config.training.optimizer.arguments == {"lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 0.0}
    assert (config.rollout.num_inference_steps, config.evaluation_steps) == (10, 20)
    assert load_config(None, ["objective=nft", "training.optimizer=SGD"]).training.optimizer.arguments == {}


def test_a_configuration_made_in_python_is_filled_in_too() -> None:
    config = TrainerConfig(objective=Spec(use="nft"), rollout=RolloutSettings(num_inference_steps=5))
    assert (config.rollout.share_initial_noise, config.evaluation_steps) == (False, 5)
    changed = TrainerConfig().model_copy(update={"rollout": RolloutSettings(), "evaluation": EvaluationSettings()})
    assert changed.rollout.dynamics is None
    assert changed.resolved() == TrainerConfig()
    broken = changed.model_copy(update={"objective": Spec(use="nft")})
    with pytest.raises(UserError, match=r"method.clip_range is 0.001, which means nothing"):
        broken.resolved()


def test_an_argument_keeps_the_rest_of_its_spec_and_a_new_use_does_not() -> None:
    assert load_config(None, ["method.advantage.gamma=0.1"]).method.advantage.model_dump() == {
        "use": "sars",
        "gamma": 0.1,
    }
    assert load_config(None, ["method.advantage=minimum"]).method.advantage.model_dump() == {"use": "minimum"}
    assert load_config(None, ["method.advantage.use=minimum"]).method.advantage.model_dump() == {"use": "minimum"}


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-03", "+.1e-2"])
def test_a_rate_may_be_written_as_people_write_it(tmp_path: Path, text: str) -> None:
    assert load_config(None, [f"training.optimizer.lr={text}"]).training.optimizer.arguments["lr"] == 0.001
    (tmp_path / "c.yaml").write_text(f"training: {{optimizer: {{lr: {text}}}}}")
    assert load_config(tmp_path / "c.yaml").training.optimizer.arguments["lr"] == 0.001


def test_rewards_change_one_by_one_or_as_a_whole() -> None:
    one = load_config(None, ["rewards.prompt.path=here"]).rewards
    assert list(one) == ["prompt", "identity"]
    assert one["prompt"].model_dump() == {"use": "ClipReward", "path": "here"}
    assert list(load_config(None, ["rewards={only: {use: ClipReward}}"]).rewards) == ["only"]
    assert load_config(None, ["metrics={}"]).metrics == {}


TWO = "rewards:\n  prompt: {use: ClipReward, path: here}\n  shape: {use: DinoReward, path: there}\n"


@pytest.mark.parametrize(
    ("file", "override", "expected"),
    [
        ("", "rewards.prompt={use: PickScoreReward}", {"prompt": "PickScoreReward", "identity": "DinoReward"}),
        ("", "rewards.prompt.use=PickScoreReward", {"prompt": "PickScoreReward", "identity": "DinoReward"}),
        ("", "rewards.prompt=PickScoreReward", {"prompt": "PickScoreReward", "identity": "DinoReward"}),
        ("", "rewards.third={use: 'a:b'}", {"prompt": "ClipReward", "identity": "DinoReward", "third": "a:b"}),
        ("", "rewards={third: {use: 'a:b'}}", {"third": "a:b"}),
        ("", "rewards={third: 'a:b'}", {"third": "a:b"}),
        (TWO, "rewards.shape={use: 'a:b'}", {"prompt": "ClipReward", "shape": "a:b"}),
        (TWO, "rewards.third={use: 'a:b'}", {"prompt": "ClipReward", "shape": "DinoReward", "third": "a:b"}),
        (
            "rewards: {prompt: {path: here}}",
            "rewards.identity={use: 'a:b'}",
            {"prompt": "ClipReward", "identity": "a:b"},
        ),
    ],
)
def test_an_override_of_one_reward_keeps_the_others(
    tmp_path: Path, file: str, override: str, expected: dict[str, str]
) -> None:
    (tmp_path / "c.yaml").write_text(file)
    found = load_config(tmp_path / "c.yaml", [override]).rewards
    assert {name: spec.use for name, spec in found.items()} == expected
    assert list(found) == list(expected)


def test_an_override_of_one_reward_keeps_the_arguments_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(TWO)
    found = load_config(tmp_path / "c.yaml", ["rewards.prompt={use: 'a:b'}", "rewards.shape.reduce=max"]).rewards
    assert found["prompt"].model_dump() == {"use": "a:b"}
    assert found["shape"].model_dump() == {"use": "DinoReward", "path": "there", "reduce": "max"}
    found = load_config(None, ["rewards.prompt.use='a:b'"]).rewards
    assert found["prompt"].model_dump() == {"use": "a:b"}
    assert found["identity"].arguments == {"path": "toyworld:dino"}


def test_an_override_of_one_metric_keeps_those_that_suit_the_data() -> None:
    oracles = ["oracle_prompt", "oracle_subject", "oracle_right"]
    assert list(load_config(None, ["metrics.sharp={use: 'a:b'}"]).metrics) == [*oracles, "sharp"]
    assert list(load_config(None, ["metrics.sharp={use: 'a:b'}", "data.train=mine.jsonl"]).metrics) == ["sharp"]
    assert list(load_config(None, ["metrics.oracle_prompt={use: 'a:b'}"]).metrics) == oracles


def test_an_override_of_an_argument_takes_a_name_for_its_mapping(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("method: {advantage: harmonic}\ntraining:\n")
    config = load_config(tmp_path / "c.yaml", ["method.advantage.gamma=0.2", "training.iterations=3"])
    assert config.method.advantage.model_dump() == {"use": "harmonic", "gamma": 0.2}
    assert config.training.iterations == 3


@pytest.mark.parametrize("override", ["=1", "seed", ".seed=1", "seed.=1", "training..iterations=1", " = 1"])
def test_an_override_without_a_name_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=r"is not an override; write section.setting=value"):
        load_config(None, [override])


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 5")
    with pytest.raises(UserError, match=r"'seed' is 5, which holds no 'first'; expected a mapping"):
        load_config(tmp_path / "c.yaml", ["seed.first=1"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("policy: {use:FluxKontextPolicy}", "'use:FluxKontextPolicy' is read as one name; a space is missing"),
        ("training:\n  iterations:5", "'training' is \"iterations:5\".*missing after the colon, write 'iterations: 5'"),
        ("seed:5", "contains \"seed:5\"; .*; a space is missing after the colon, write 'seed: 5'"),
    ],
)
def test_a_missing_space_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="a space is missing after the colon, write 'use: x'"):
        load_config(None, ["policy={use:x}"])


def test_text_that_looks_like_a_number_is_stored_as_text(tmp_path: Path) -> None:
    config = load_config(None, ["tracking.project='1e3'"])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_a_stored_configuration_is_never_empty(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert read_tree(tmp_path / "c.yaml") == {}
    with pytest.raises(UserError, match=r"c.yaml' is empty; expected a mapping of settings.*restore the file"):
        read_tree(tmp_path / "c.yaml", stored=True)


def test_the_toy_worlds_oracle_is_not_asked_about_other_data() -> None:
    assert load_config(None, ["data.train=mine.jsonl"]).metrics == {}
    assert load_config(None, ["data.train=mine.jsonl", "data.eval=toyworld"]).metrics == load_config().metrics
    named = load_config(None, ["data.train=mine.jsonl", "metrics={sharp: {use: ClipReward}}"]).metrics
    assert list(named) == ["sharp"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("trainign.iterations=3", r"no setting 'trainign'\. Did you mean 'training'\?"),
        ("training.iteratoins=3", r"no setting 'training.iteratoins'\. Did you mean 'iterations'\?"),
        ("training.iterations=many", r"'training.iterations' is \"many\": expected a whole number"),
        ("training.iterations=0", r"'training.iterations' is 0: expected 1 or more"),
        ("training.iterations=2.5", r"is 2.5: expected a whole number"),
        ("training.iterations=yes", r"is true: expected a whole number"),
        ("training=5", r"'training' is 5: expected a mapping of settings"),
        ("data.train=no", r"'data.train' is false: expected text or a name, or a mapping such as {use: name}\."),
        ("rewards.prompt=null", r"'rewards.prompt' is null: expected a name, or a mapping"),
        ("tracking.log_with=5", r"'tracking.log_with' is 5: expected a list, such as"),
        ("objective.levels=2", r"There is no setting 'objective.levels'"),
        ("objective={use: nft, mixx: 1}", r"no setting 'objective.mixx'\. Did you mean 'mix'\?"),
        ("objective={use: nft, mix: -1}", r"'objective.mix' is -1: expected more than 0"),
        ("objective=5", r"'objective' is 5: expected a name, or a mapping"),
        ("training.lr_schedule=wavy", r"'training.lr_schedule' is \"wavy\""),
        ("iterations", r"'iterations' is not an override; write section.setting=value"),
        ("seed=[1", r"The value of 'seed=\[1': invalid YAML: a bracket or a brace is not closed"),
        ("method.advantage={gamma: 1, use: }", r"'method.advantage.use' is null: expected text"),
        ("objective={use: [a]}", r"'objective.use' is \[\"a\"\]: expected text"),
        ("rewards=null", r"'rewards' is null: expected a mapping, such as {name: value}\."),
        ("rewards.new.path=x", r"The setting 'rewards.new.use' is missing"),
        ("data.train={path: x}", r"The setting 'data.train.use' is missing"),
        ("data.train.use.x=1", r"'data.train.use' is {\"x\": 1}: expected text"),
        ("tracking.log_with=[5]", r"'tracking.log_with.0' is 5: expected text"),
        ("method.clip_range=.inf", r"The value of 'method.clip_range=.inf': .inf is not finite"),
        (f"seed={'n' * 300}", r"'seed' is \"n+...: expected a whole number"),
    ],
)
def test_a_wrong_setting_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- 1\n- 2\n", "contains a list"),
        ("seed: 1\na: [", "line 2: invalid YAML"),
        ("\x00", "this is not UTF-8 text"),
        ("seed: 1\ntraining: {iterations: 2}\nseed: 2", "line 3: duplicate key 'seed'"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_config(tmp_path / "bad.yaml")


def test_another_model_does_not_inherit_what_suits_the_embedded_one() -> None:
    assert load_config(None, ["policy.dtype=float32"]).policy.arguments["trainable"] == "full"
    assert load_config(None, ["policy.path=my/kontext"]).policy.arguments == {"path": "my/kontext"}


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == Config()


# ---- files that extend others


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_file_lies_over_those_that_it_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, base="seed: 1\nverified: tiny\nmethod: {advantage: {use: sars, gamma: 0.1}, beta: 0.5}\n")
    write(tmp_path, more="seed: 2\nobjective: nft\nrollout: {steps: null}\n")
    write(tmp_path / "sub", mine="extends: [../base.yaml, ../more.yaml]\nmethod: {advantage: {gamma: 0.2}}\n")
    write(tmp_path / "sub", other="extends: mine.yaml\nobjective: {levels: 2}\nmethod: {advantage: cme}\n")
    monkeypatch.chdir(tmp_path)
    config = load_config("sub/mine.yaml", ["training.iterations=3"])
    assert (config.seed, config.training.iterations, config.verified) == (2, 3, None)
    assert config.method.advantage.model_dump() == {"use": "sars", "gamma": 0.2}
    assert (config.method.beta, config.objective.use) == (0.5, "nft")
    other = load_config(tmp_path / "sub" / "other.yaml")
    assert other.objective.arguments["levels"] == 2
    assert other.method.advantage.model_dump() == {"use": "cme"}
    assert load_config("base.yaml").verified == "tiny"


def test_a_packaged_recipe_is_extended_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, mine="extends: kontext\npolicy: {path: my/kontext}\nrewards: {identity: {batch_size: 2}}\n")
    mine, theirs = load_config(tmp_path / "mine.yaml"), load_config("kontext")
    assert mine.policy.arguments == {**theirs.policy.arguments, "path": "my/kontext"}
    assert mine.rewards["prompt"] == theirs.rewards["prompt"]
    assert mine.rewards["identity"].arguments["batch_size"] == 2
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "real").write_text("seed: 7")
    monkeypatch.chdir(tmp_path)
    assert load_config("kontext").seed == 0, "what a recipe extends is not looked for where one starts from"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: mine.yaml", r"'mine.yaml' extends 'mine.yaml', which extends it in turn; remove one of the two\."),
        ("extends: far.yaml", r"'far.yaml' extends 'mine.yaml', which extends it in turn"),
        ("extends: kontxt", r"no configuration file 'kontxt'; .*; '.*mine.yaml' extends it\. Did you mean 'kontext'"),
        ("extends: {a: 1}", r"The setting 'extends' of 'mine.yaml' is \[.*\]: expected a recipe or a file\."),
        ("verified: yes please", r"'verified' is \"yes please\": expected none, tiny, or full \(hardware, date\)"),
        ("verified: full (H200)", r"expected none, tiny, or full"),
    ],
)
def test_what_cannot_be_extended_or_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, mine=text, far="extends: mine.yaml")
    with pytest.raises(UserError, match=said):
        load_config("mine.yaml")


def is_run(path: Path) -> bool:
    return "\nmethods:" not in path.read_text() and path.parent.name != "bench"


@pytest.mark.parametrize("path", [p for p in RECIPES if is_run(p)], ids=lambda p: p.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    check_names(load_config(path))
