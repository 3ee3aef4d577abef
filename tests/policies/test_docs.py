"""The examples of docs/policies.md, executed as they are written there."""

import re
from pathlib import Path

import torch
import yaml

from customized_grpo import policies
from customized_grpo.policies import PipelinePolicy, check_policy
from customized_grpo.policies.lora import LoraSettings
from customized_grpo.settings import Spec
from customized_grpo.settings.build import check_spec

from . import tiny

TEXT = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")


def run(name: str) -> dict:
    (code,) = re.findall(rf"<!-- run: {name} -->\n```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    found: dict = {"__name__": "example"}
    exec(compile(code, "docs/policies.md", "exec"), found)
    return found


def test_the_variation_is_a_policy():
    two = run("variation")["TwoPlanes"](tiny.kontext_pipeline(), lora=LoraSettings(rank=2), device="cpu")
    examples = [tiny.example(name, sizes=((16, 16), (16, 8))) for name in "ab"]
    check_policy(two, examples)
    assert two.encode(examples)["ids"][0, :, 0].unique().tolist() == [0, 1, 2]


def test_the_complete_policy_is_one(tmp_path):
    made = run("complete")["MosaicPolicy"]()
    examples = [tiny.example("a"), tiny.example("b")]
    check_policy(made, examples)
    made.save(tmp_path / "adapter")
    before = {name: p.clone() for name, p in made.trainable_state().items()}
    made.module.weight.data += 1
    with made.base():
        assert torch.equal(made.module.weight, before["weight"])
    assert torch.equal(made.module.weight, before["weight"] + 1)


def test_every_configuration_shown_names_only_settings_that_exist():
    shown = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(shown) == 2
    for block in shown:
        check_spec(Spec(**yaml.safe_load(block)["policy"]), "policy")


def test_the_table_of_families_is_complete_and_right():
    rows = {row[0]: row for row in re.findall(r"^\| `(\w+Policy)` \| `(\w+)`[^|]*\| (\d)(?:–(\d))? \|", TEXT, re.M)}
    families = [getattr(policies, n) for n in policies.__all__ if n.endswith("Policy")]
    families = [f for f in families if issubclass(f, PipelinePolicy) and f is not PipelinePolicy]
    assert set(rows) == {family.__name__ for family in families}
    for family in families:
        _, pipeline, least, most = rows[family.__name__]
        assert (pipeline, least, int(most or least)) == (family.PIPELINE, "1", family.MAX_REFERENCES)
