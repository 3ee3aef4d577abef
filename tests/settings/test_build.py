import pytest
import torch

from customized_grpo.errors import UserError
from customized_grpo.functional.advantages import sars
from customized_grpo.settings import Spec
from customized_grpo.settings.build import HOMES, bind, check_spec, construct, resolve


def spec(use: str, **arguments) -> Spec:
    return Spec(use=use, **arguments)


class Scaled:
    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, images, examples):
        return images.mean((1, 2, 3)) * self.factor


def test_a_bare_name_is_looked_up_at_home_and_a_path_anywhere() -> None:
    assert resolve("sars", "advantage") is sars
    assert resolve("customized_grpo.functional.advantages:sars", "time_weights") is sars
    assert resolve("settings.test_build:Scaled", "reward") is Scaled


def test_arguments_are_bound() -> None:
    z, weights = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]]), torch.tensor([[0.5, 0.5]])
    assert torch.equal(bind(spec("sars", gamma=0.0), "advantage")(z, weights), sars(z, weights, gamma=0.0))


def test_a_class_is_made_with_its_arguments_and_what_it_accepts_of_the_rest() -> None:
    assert construct(spec("settings.test_build:Scaled", factor=3.0), "reward", seed=1).factor == 3.0
    assert construct(spec("settings.test_build:Scaled"), "reward", factor=2.0).factor == 2.0


@pytest.mark.parametrize(
    ("use", "slot", "sentence"),
    [
        ("sras", "advantage", r"there is no 'sras' in .*advantages\. Did you mean 'sars'\?"),
        ("function", "dataset", r"there is no 'function' in .*\. Expected JsonlDataset, HubDataset, ToyWorld, or pack"),
        ("nowhere.at.all:thing", "reward", r"cannot import 'nowhere.at.all'"),
        ("settings.test_build:Skaled", "reward", r"Did you mean 'Scaled'\?"),
    ],
)
def test_an_unknown_name_is_one_sentence(use: str, slot: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve(use, slot)


def test_an_unknown_argument_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"takes no setting 'gama'\. Did you mean 'gamma'\?"):
        check_spec(spec("sars", gama=1), "advantage")
    with pytest.raises(UserError, match=r"takes no setting 'resolutoin'\. Did you mean 'resolution'\?"):
        check_spec(spec("FluxKontextPolicy", resolutoin=64), "policy")


@pytest.mark.parametrize(
    ("use", "slot", "arguments", "sentence"),
    [
        ("AdamW", "optimizer", {"lr": "abc"}, r"The setting 'optimizer.lr' is \"abc\": expected a number\.$"),
        ("AdamW", "optimizer", {"betas": [0.9]}, r"The setting 'optimizer.betas' is \[0.9\]: expected more values\.$"),
        ("AdamW", "optimizer", {"params": [1]}, r"AdamW takes no setting 'params'\. It takes lr, betas,"),
        ("sars", "advantage", {"gamma": True}, r"'advantage.gamma' is true: expected a number"),
        ("sars", "advantage", {"gamma": "0.4"}, r"'advantage.gamma' is \"0.4\": expected a number"),
        ("sars", "advantage", {"gamma": None}, r"'advantage.gamma' is null: expected a number"),
        ("ClipReward", "reward", {"batch_size": 2.5}, r"'reward.batch_size' is 2.5: expected a whole number"),
        ("ClipReward", "reward", {"path": 5}, r"'reward.path' is 5: expected text"),
        ("ToyWorld", "dataset", {"kinds": ["x"]}, r"'dataset.kinds.0' is \"x\": expected 'recontext', "),
        ("FluxKontextPolicy", "policy", {"lora": {"rank": 0}}, r"'policy.lora.rank' is 0: expected 1 or more"),
        ("FluxKontextPolicy", "policy", {"lora": 5}, r"'policy.lora' is 5: expected a mapping of settings"),
        ("by_loop_index", "time_weights", {"schedule": "linear"}, r"expected a function, which only Python can give"),
    ],
)
def test_an_argument_of_another_type_is_one_sentence(use: str, slot: str, arguments: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_spec(spec(use, **arguments), slot)


@pytest.mark.parametrize(
    ("use", "slot", "arguments"),
    [
        ("AdamW", "optimizer", {"lr": 1, "betas": [0, 0.9], "foreach": None}),
        ("AdamW", "optimizer", {"lr": torch.tensor(0.1)}),
        (
            "FluxKontextPolicy",
            "policy",
            {"lora": {"rank": 2, "targets": ["to_q"]}, "device": 0, "dtype": torch.float32},
        ),
        ("flow_sde", "dynamics", {"sigma_max": 0.9}),
        ("piecewise", "time_weights", {"weights": [[1, 0], [0, 1]], "boundaries": [0.5]}),
        ("settings.test_build:Scaled", "reward", {"factor": "text"}),
    ],
)
def test_what_fits_the_annotation_passes_and_other_code_is_its_own_judge(use: str, slot: str, arguments: dict) -> None:
    check_spec(spec(use, **arguments), slot)


def test_a_name_is_suggested_whatever_its_case() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'AdamW'\?"):
        check_spec(spec("Adamw"), "optimizer")


@pytest.mark.parametrize(
    ("use", "slot", "name"),
    [("constant", "time_weights", "weights"), ("UnoPolicy", "policy", "path"), ("HubDataset", "dataset", "path")],
)
def test_an_argument_without_a_default_is_asked_for(use: str, slot: str, name: str) -> None:
    with pytest.raises(UserError, match=f"The setting '{slot}.{name}' is missing; {use} needs it"):
        check_spec(spec(use), slot)


@pytest.mark.parametrize("use", ["builtins:dict", "os:path", "os:sep", "torch:Tensor"])
@pytest.mark.parametrize("slot", HOMES)
def test_what_is_no_function_or_class_of_python_is_one_sentence(use: str, slot: str) -> None:
    with pytest.raises(UserError, match=f"{slot}: {use} takes no settings; expected a function or class of Python"):
        check_spec(spec(use), slot)


def test_a_missing_argument_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"The setting .reward.path. is missing; settings.test_build:Needs needs it"):
        construct(spec("settings.test_build:Needs"), "reward")


class Needs:
    def __init__(self, path: str) -> None:
        self.path = path


class Breaks:
    def __init__(self, path: str = "there") -> None:
        raise KeyError("no weights")


def test_what_goes_wrong_in_anybodys_code_is_one_sentence(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"Breaks could not be constructed with path='here' \(KeyError: 'no weights'\)"):
        construct(spec("settings.test_build:Breaks", path="here"), "reward")
    (tmp_path / "unwritten.py").write_text("def (")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"importing 'unwritten' for 'unwritten:x' failed \(SyntaxError: "):
        resolve("unwritten:x", "reward")
