"""Bad configurations and command lines, which must be refused in one sentence: `make fuzz`.

    python tools/bad_input.py [WORD ...]

Every command line that holds one of the words (default: all) is run in this process, in a folder made for it, and its
sentence is printed. Those that end in another way, load weights or write a file make the exit status 1.
"""

import contextlib
import io
import os
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import typer
from PIL import Image

RUN = Path(__file__).parents[1] / "tests" / "fixtures" / "run-0.1.0"
LONG = "n" * 300
DEEP = "d/" * 3000
HALF = "\udce9"
"""How Python shows a byte of a command line that is not UTF-8: half of a surrogate pair."""
STANDS_FOR = {"LONG": LONG, "DEEP": DEEP, "HALF": HALF}
"""Words of the tables below, in which | parts one value or command line from the next."""

YAML = {
    "a list": b"- 1\n- 2\n",
    "text": b"seed\n",
    "a number": b"5\n",
    "an open bracket": b"seed: 1\ntraining: [",
    "an open brace": b"training: {iterations: 2\n",
    "an open quote": b'policy: {path: "here}\n',
    "a tab": b"training:\n\titerations: 2\n",
    "bad indentation": b"training:\n  iterations: 2\n seed: 1\n",
    "two colons": b"training: iterations: 2\n",
    "a colon without a space in a block": b"training:\n  iterations:5\n",
    "a colon without a space at the top": b"seed:5\n",
    "a colon without a space in braces": b"policy: {use:FluxKontextPolicy}\n",
    "colons without a space in braces": b"rewards:\n  prompt: {use:ClipReward, path:toyworld:clip}\n",
    "a colon without a space, then with": b"policy: {use:FluxKontextPolicy, path: here}\n",
    "a colon without a space before a mapping": b"seed:5\ntraining: {iterations: 2}\n",
    "duplicate keys": b"seed: 1\nseed: 2\n",
    "duplicate keys below": b"training:\n  iterations: 1\n  iterations: 2\n",
    "a set": b"rewards: !!set {prompt, identity}\n",
    "a set below": b"tracking: {log_with: !!set {tensorboard}}\n",
    "an ordered map": b"rewards: !!omap [prompt: 1]\n",
    "pairs": b"rewards: !!pairs [prompt: 1]\n",
    "binary": b"tracking: {project: !!binary aGVsbG8=}\n",
    "a date": b"policy: {path: 2024-01-01}\n",
    "a python object": b"policy: !!python/object/apply:os.system [ls]\n",
    "a python tuple": b"rewards: !!python/tuple [1]\n",
    "an unknown tag": b"policy: !Policy {use: x}\n",
    "an integer key": b"rewards: {1: {use: ClipReward}}\n3: 4\n",
    "a list as a key": b"? [a, b]\n: 1\n",
    "a mapping as a key": b"{{a: 1}: 2}\n",
    "a template": b"seed: {{ seed }}\n",
    "a list as a key below": b"policy: {use: FluxKontextPolicy, ? [a]: 1}\n",
    "a null key": b"~: 5\n",
    "an empty key": b"'': 5\n",
    "a true key": b"yes: 5\n",
    "a number key": b"1.5: 5\n",
    "a recursive list": b"a: &a [*a]\n",
    "a recursive mapping": b"policy: &a {use: FluxKontextPolicy, lora: *a}\n",
    "a recursive reward": b"rewards: &a {prompt: *a}\n",
    "an unknown anchor": b"policy: *nowhere\n",
    "a bomb": b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + b"".join(b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 10)) for n in range(98, 112)),
    "nested brackets": b"seed: " + b"[" * 3000 + b"]" * 3000 + b"\n",
    "nested braces": b"policy: " + b"{a: " * 400 + b"1" + b"}" * 400 + b"\n",
    "nested blocks": b"".join(b" " * n + b"a:\n" for n in range(400)),
    "nested in an argument": b"policy: {use: FluxKontextPolicy, lora: " + b"[" * 200 + b"]" * 200 + b"}\n",
    "a huge integer": b"seed: " + b"9" * 5000 + b"\n",
    "a huge integer in an argument": b"method: {advantage: {use: sars, gamma: " + b"9" * 5000 + b"}}\n",
    "an integer of 60 digits": b"seed: " + b"9" * 60 + b"\n",
    "a huge float": b"method: {beta: 1e999}\n",
    "infinity": b"method: {clip_range: .inf}\n",
    "infinity in an argument": b"method: {advantage: {use: sars, gamma: .inf}}\n",
    "no number": b"method: {clip_range: .nan}\n",
    "no number in an argument": b"rollout: {dynamics: {use: flow_sde, noise_level: .nan}}\n",
    "half a surrogate pair": b'policy: {path: "a\\ud800b"}\n',
    "half a surrogate pair in a name": b'rewards: {"\\ud800": {use: ClipReward}}\n',
    "a zero character": b'output: "a\\0b"\n',
    "a zero character in a path": b'policy: {path: "a\\0b"}\n',
    "a zero byte": b"seed: 1\n\0\n",
    "a control character": b"seed: \x07\n",
    "latin-1": "output: caf\xe9\n".encode("latin-1"),
    "an image": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "utf-16 without a mark": "seed: 1\n".encode("utf-16-le"),
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "a directive": b"%YAML 9.9\n---\nseed: 1\n",
    "json with a comma": b'{"seed": 1,, "output": null}\n',
    "python": b"import torch\nseed = 5\n",
    "toml": b"[training]\niterations = 5\n",
    "ini": b"seed = 5\n",
    "a merge of a list": b"training: {<<: [1, 2]}\n",
    "a merge of text": b"training: {<<: text}\n",
    "a null section": b"training:\n",
    "a list section": b"training: [iterations]\n",
    "an unknown section": b"trainnig: {iterations: 2}\n",
    "an unknown setting": b"training: {iteratoins: 2}\n",
    "an unknown setting in a block": b"training:\n  iteratoins: 2\n  lr: 3\n",
}
"""Files that are no configuration, by what is wrong with them."""

NUMBERS = "seed rollout.num_generations rollout.num_inference_steps training.iterations checkpoint.every"
NAMES = (
    "policy method.advantage method.time_weights rollout.dynamics rollout.steps training.optimizer rewards.prompt "
    "metrics.oracle_prompt objective"
)
SETTINGS = {
    NUMBERS: "abc | 2.5 | yes | [1] | {a: 1} | null | 1e400 | ''",
    "method.advantage_clamp method.clip_range method.beta training.ema_decay": (
        "abc | no | [1] | {a: 1} | null | -1 | .nan | .inf"
    ),
    "method.ratio_norm rollout.share_initial_noise": "maybe | 2 | [yes] | {a: 1} | null",
    "training.lr_schedule training.old_log_probs": "wavy | 5 | [linear] | null | yes",
    "tracking.project": "5 | [a] | {a: 1} | null | yes | 2.5",
    "output evaluation.base": "5 | [a] | {a: 1} | yes | 2.5",
    "tracking.log_with": "5 | {a: 1} | null | [5] | [[tensorboard]] | [null] | true",
    NAMES: (
        "5 | [a] | null | yes | {use: 5} | {use: null} | {use: [a]} | '' | {use: ''} | nowhere | "
        "'no.such.module:name' | 'os:nothing' | 'a:b:c' | ':' | 'x:' | '.a:b' | 'a..b:c' | {use:x} | 'torch: nn' "
        "| '../a:b' | é | LONG"
    ),
    "rewards metrics": "null | 5 | text | [a] | yes | {a: 5} | {a: null} | {a: [b]} | {use:x} | !!set {a} | {1: 2}",
    "data.train data.eval": (
        "5 | [a] | yes | {use: 5} | '' | nowhere.jsonl | nowhere | full | photo.png | 'a:b' | LONG.jsonl | "
        "notes/x.jsonl | {use: HubDataset} | {use: JsonlDataset, path: nowhere.jsonl} | {use:x} | empty.jsonl | "
        "broken.jsonl | {use: JsonlDataset, path: [1]}"
    ),
    "training method rollout evaluation tracking checkpoint data": "5 | null | [a] | text | yes | iterations:5",
}
"""Settings, and values of other types or that name nothing."""

ARGUMENTS = {
    "training.optimizer.lr": "abc | -1 | 0 | [1] | {a: 1} | yes",
    "training.optimizer.betas": "5 | [1] | [a, b] | [2, 3]",
    "training.optimizer.weight_decay": "abc",
    "training.optimizer.learning_rate": "1",
    "training.optimizer.params": "[1]",
    "training.optimizer": "LBFGS | SparseAdam | Adamw",
    "training.optimizer.eps": "-1",
    "policy.dtype": "float99 | float16 | 5 | [a] | null",
    "policy.trainable": "half | 5",
    "policy.path": (
        "nowhere | full | photo.png | 5 | null | [a] | 'toyworld:nothing' | '' | LONG | ./nowhere | "
        "/nowhere/at/all | 'toyworld:clip' | headless | other | foreign | garbled | listed | weightless"
    ),
    "policy.resolution": "-1 | abc",
    "policy.width": "64",
    "policy.lora": "{rank: 0} | {rnak: 4} | {rank: abc} | 5 | {targets: []}",
    "policy.quantize": "int3 | int8",
    "policy.device": "nowhere | 5.5",
    "policy.offload": "gpu",
    "policy.aspect": "round",
    "policy.shift": "-1 | abc",
    "policy.cache_mib": "abc",
    "policy.guidance_scale": "abc",
    "policy.revision": "main",
    "policy.seed": "abc",
    "policy.gradient_checkpointing": "maybe",
    "policy.pipeline": "5",
    "policy.nothing": "5",
    "policy.use": "Policy | LoraSettings",
    "policy": "{use: UnoPolicy, path: a/b} | {use: UnoPolicy, path: nowhere, adapter: nowhere}",
    "policy.max_text_tokens": "0",
    "policy.negative_prompt": "5",
    "rewards.prompt.path": "nowhere | full | photo.png | 'toyworld:nothing' | 5 | null | '' | LONG",
    "rewards.prompt.processor": "nowhere",
    "rewards.prompt.revision": "main",
    "rewards.prompt.batch_size": "abc | 0",
    "rewards.prompt.device": "nowhere",
    "rewards.prompt.nothing": "5",
    "rewards.identity.reduce": "median",
    "rewards.identity.segment": "maybe",
    "rewards.identity.path": "garbled | weightless",
    "rewards.prompt": "Reward | check_reward",
    "rewards": (
        "{} | {a: {use: VlmJudge}} | {a: {use: VlmJudge, model: x, rubric: beauty}} | {a: {use: VlmJudge, "
        "model: 5}} | {a: {use: VlmJudge, model: x, url: 5}} | {a: {use: VlmJudge, model: x, prices: [1]}} | "
        "{a: RemoteReward} | {a: {use: RemoteReward, reward: {}}} | {a: {use: RemoteReward, reward: x:y, url: "
        "http://h}} | {a: {use: RemoteReward, reward: 'x:y', python: nowhere}} | {a: {use: RemoteReward, "
        "reward: 5}} | {a: {use: Hpsv2Reward, path: nowhere}} | {a: {use: PickScoreReward, path: nowhere}} | "
        "{a: {use: ClipImageReward, path: nowhere}} | {a: {use: PickScoreReward, path: 'toyworld:clip'}} | "
        "{'a/b': ClipReward} | {'..': ClipReward} | {'': ClipReward} | {LONG: ClipReward} | {oracle_prompt: "
        "{use: ClipReward, path: 'toyworld:clip'}, identity: {use: DinoReward, path: 'toyworld:dino'}}"
    ),
    "metrics": "{a: {use: DinoReward, path: nowhere}} | {a: PromptShow}",
    "method.advantage.gamma": "abc | null | [1]",
    "method.advantage.gama": "1",
    "method.advantage.z": "1",
    "method.advantage": "synergy",
    "method.time_weights": (
        "{use: constant} | {use: constant, weights: abc} | {use: constant, weights: [1]} | {use: constant, "
        "weights: [1, 2, 3]} | {use: constant, weights: [a, b]} | {use: constant, weights: 5} | {use: "
        "from_file, path: nowhere.json} | {use: from_file, path: full} | {use: from_file, path: photo.png} | "
        "{use: from_file, path: bad.json} | {use: from_file, path: LONG} | from_file | {use: piecewise, "
        "boundaries: [1]} | {use: sigmoid_crossover, high: abc} | {use: tabulated, grid: [1, 0], weights: "
        "[[1, 1], [1, 1]]}"
    ),
    "rollout.dynamics.noise_level": "0 | abc | -1 | null",
    "rollout.dynamics": "ode_step",
    "rollout.steps.fraction": "0 | 2 | abc",
    "rollout.steps": (
        "{use: sliding_window, size: 100} | {use: sliding_window, strategy: wavy} | {use: sliding_window, size: a}"
    ),
    "tracking.log_with": "wandbb | [tensorboard, wandbb] | all | '' | wandb",
    "training.micro_batch": "7",
    "rollout.num_generations": "1",
    "training.ema_decay": "1",
    "training.iterations": "0",
    "evaluation.base": "nowhere.json | full | bad.json | LONG",
    "output": "full | photo.png | photo.png/y | notes/a/b/c | LONG | run | DEEP/x | '' | .",
    "data.train": (
        "unknown.jsonl | {use: 'mine:missing'} | {use: ToyWorld, split: test} | {use: ToyWorld, count: 0} | "
        "{use: ToyWorld, count: abc} | {use: HubDataset, path: 5}"
    ),
}
"""Settings that are refused for what stands behind them."""

OVERRIDES = (
    "=5", "seed=", "seed=[1", "seed={", 'seed="', "seed=: :", "seed=*x", "seed=&x", "seed=!!set {a}", "seed=!x 5",
    ".=1",
    ".seed=1", "seed.=1", "training..iterations=1", "training.=1", " =1", "seed.x=1", "seed.x.y=1", "output.x=1",
    "training.iterations.x=1", "seed==1", "trainign.iterations=3", "training.iteratoins=3", "training=iterations=3",
    "training.iterations:=3", "a.b.c.d.e.f=1", "policy.use.x=1", "--seed=1", "SEED=1", "data.train.use.x=1",
    "tracking.log_with.0=wandb", "rewards.prompt.use={a: 1}", "rewards..path=x", "rewards.=x", "rewards.new.path=x",
    "metrics.new.path=x", "method.advantage=[", f"seed={HALF}", f"{HALF}=1", f"output=caf{HALF}", "seed=\x07",
    "seed=\x00",
    f"{LONG}=1", f"seed={LONG}", "a=&a [*a]", "seed=" + "[" * 900 + "]" * 900, "seed=" + "9" * 5000,
    "policy={use:FluxKontextPolicy}", "rewards.prompt={use:ClipReward}", "rewards={prompt:ClipReward}",
    "policy={use: FluxKontextPolicy,path:toyworld:pipeline}", "training={iterations:5}", "policy=use:FluxKontextPolicy",
    "training.iterations =x", "'training.iterations'=x", "training/iterations=3", "training[iterations]=3",
    'policy.path="\\ud800"', "policy.path='", "[seed]=1", "{seed: 1}=2",
)  # fmt: skip
"""Overrides that are none, or change what does not exist."""

COMMANDS = {
    "": "nothing | --nothing",
    "train": "--nothing | --resume | --resume runs/blank | --resume runs/odd",
    "data": " | nothing | import | check",
    "rewards": " | nothing",
    "config": "--chek",
    "train --resume run": (
        "empty.yaml | seed=5 | policy.use=UnoPolicy | training.iterations=abc | nothing=1 | "
        "rewards.prompt.path=nowhere | training.optimizer=SGD | training.iterations=3 "
        "tracking.log_with=wandbb"
    ),
    "report": (
        "compares/odd | benches/bare | benches/odd | probes/odd | nowhere | photo.png | full | '' | LONG |  | "
        "photo.png/y | probes/cut | compares/cut | benches/cut | probes/listed | compares/empty | benches/listed "
        "| cafHALF | compares/set | benches/empty"
    ),
    "generate": " | --run runs/unseen",
    "generate --run run": (
        "--count 0 | --count abc | --iteration 99 | --seed x | --reference nowhere.png --prompt a | "
        "--reference photo.png | --prompt '' | --reference text.txt --prompt a | --reference full --prompt a "
        "| --reference LONG.png --prompt a | --reference photo.png/y.png --prompt a | --output photo.png | "
        "--output photo.png/y | --output x.yaml | --output LONG.png | --output full | --output '' | --output "
        "notes/a/b.png | --output aHALF.png | --output full/"
    ),
    "export": "--run run | --output new.safetensors | --run runs/cut --output new.safetensors",
    "export --run run": (
        "--output x.png | --output photo.png/y.safetensors | --output full | --output LONG.safetensors | "
        "--output old.safetensors | --output new.safetensors --format onnx | --output new.safetensors "
        "--iteration 7 | --output new.safetensors --iteration x | --output '' | --output aHALF.safetensors"
    ),
    "eval": (
        "--run run empty.yaml | --run run policy.use=UnoPolicy | --output full | --output photo.png | "
        "--output photo.png/y | --output LONG | evaluation.examples=0 | --run run --iteration 99 | "
        "--iteration x | --iteration 3 | nowhere.yaml"
    ),
    "probe": (
        "--run run empty.yaml | --iteration 3 | --examples 0 | --branches 0 | --batch 0 | --examples x | --output "
        "full | --output photo.png | --output photo.png/y | --output LONG | --resume nowhere | --resume "
        "probes/cut | --resume probes/listed | --resume probes/empty | --resume x empty.yaml | --resume full | "
        "--resume probes/hollow | --resume probes/bare | --resume probes/odd | --resume x --run run | --resume "
        "probes/wrong | --branches 1"
    ),
    "compare": (
        " | nowhere.yaml | empty.yaml x.yaml | --resume nowhere | --status nowhere | --status full | --status "
        "photo.png | --resume run grid.yaml | photo.png | --status compares/cut | --status "
        "compares/empty | --resume compares/set | yaml/a-recursive-list.yaml | yaml/a-set.yaml "
        "| yaml/nested-brackets.yaml | yaml/a-list-as-a-key.yaml"
    ),
    "compare grid.yaml": (
        "--workers 0 | seeds=[] | 'seeds=[0, 0]' | seeds=x | methods=[nothing] | methods=[] | methods=5 | "
        "baseline=x | config.seed=1 | config=5 | config.output=x | config.training.iteratoins=1 | "
        "config.training.iterations=x | config.rewards=null | config.method=5 | config.evaluation=5 | "
        "config.policy.path=nowhere | config.tracking.log_with=wandbb | 'own_methods={'\"'\"'../x'\"'\"': {}}' "
        "'methods=['\"'\"'../x'\"'\"']' | own_methods=5 | 'own_methods={LONG: {}}' 'methods=[LONG, naive_1to1, "
        "customized]' | 'own_methods={a: {config: 5}}' | 'own_methods={a: 5}' | 'line=[sars, sars]' | "
        "line=[sars] | probe=5 | checks=5 | pictures=-1 | nothing=1 | --output full | --output photo.png | "
        "--output photo.png/y | --output LONG | seeds=[a] | config.rollout.steps.fraction=abc | "
        "config.rollout.steps=nothing | config=null | probe=nowhere | config.data.train=nowhere.jsonl"
    ),
    "bench": (
        "nothing | toyworl | nowhere.yaml | dreambooth | dreambooth data=nowhere | dreambooth data=full | "
        "dreambooth data=photo.png | dreambench++ data=full | uno-multi data=full | uno-multi data=full "
        "prompts=nowhere.json | images=1 x | yaml/a-recursive-list.yaml | yaml/a-set.yaml | dreambooth "
        "data=LONG | '' | uno-multi data=full prompts=LONG | protocol=5 | protocol=null"
    ),
    "bench toyworld": (
        "uno | data=full | images=0 | images=x | metrics=5 | 'metrics={a: 5}' | policy=5 | 'policy={nothing: "
        "1}' | 'policy={1: 2}' | 'policy={path: nowhere}' | seed=x | --part 9/8 | --part x | --iteration 3 | "
        "--config nowhere.yaml | --config full | --config yaml/a-set.yaml | --against nowhere | --against "
        "full | --against benches/cut | --against benches/listed | --run run --config empty.yaml | "
        "--output full | --output photo.png | --output photo.png/y | --output LONG | config=nowhere.yaml | "
        "--run run --iteration 99 | metrics.oracle_prompt=5 | 'metrics={prompt: {use: 5}}'"
    ),
    "data import": (
        "nothing full new.jsonl | dreambench nowhere new.jsonl | dreambench full new.jsonl | syncd nowhere "
        "new.jsonl | syncd photo.png new.jsonl | syncd bad.json new.jsonl | syncd full new.jsonl | "
        "subjects200k nowhere new.jsonl | subjects200k full new.jsonl"
    ),
    "data import folder": (
        "full new.jsonl | nowhere new.jsonl --prompts text.txt | subjects new.jsonl --prompts nowhere.txt | "
        "subjects new.jsonl --prompts full | subjects new.jsonl --prompts photo.png | subjects new.jsonl "
        "--prompts LONG.txt | subjects new.json --prompts text.txt | subjects data.jsonl --prompts text.txt | "
        "subjects photo.png/x.jsonl --prompts text.txt | subjects LONG.jsonl --prompts text.txt | subjects "
        "new.jsonl --prompts text.txt --references none | photo.png new.jsonl --prompts text.txt | LONG "
        "new.jsonl --prompts text.txt | odd new.jsonl --prompts text.txt | subjects aHALF.jsonl --prompts "
        "text.txt"
    ),
    "data check": (
        "nowhere.jsonl | full | photo.png | LONG.jsonl | photo.png/x.jsonl | '' | data.jsonl --smallest x | "
        "cafHALF.jsonl"
    ),
    "rewards check": (
        "--count 1 | --count x | nowhere.yaml | rewards=null | rewards.prompt.path=nowhere | "
        "data.train=nowhere.jsonl | rewards.prompt=nothing | yaml/a-set.yaml | metrics.x=5 | full"
    ),
}
"""Command lines with one thing wrong, by how they begin."""
FOLDERS = (
    "nowhere | photo.png | photo.png/run | full | runs/hollow | runs/listed | runs/damaged | runs/binary | "
    "runs/foreign | runs/folder | runs/wrong | runs/set | runs/notes | '' | LONG | DEEP/ | cafHALF"
)
"""Run folders that are none, or are damaged."""
OF_FOLDER = (
    "train --resume {} | generate --run {} | export --output new.safetensors --run {} | eval --run {} | "
    "probe --run {} | bench toyworld --run {}"
)
"""What is asked of each."""
FILES = (
    "nowhere.yaml | full | photo.png | empty.yaml empty.yaml | LONG.yaml | photo.png/y.yaml | '' | cafHALF.yaml | "
    "seed | --nothing | nowhere.yaml seed=1 | DEEP/x.yaml | -x"
)
"""What is no configuration file."""


@dataclass(frozen=True)
class Bad:
    """A command line that must be refused in one sentence."""

    kind: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(word if len(word) < 90 else f"{word[:80]}..." for word in self.words)


def told(text: str) -> list[str]:
    """The values or command lines of a text."""
    parts = text.split(" | ")
    for name, meaning in STANDS_FOR.items():
        parts = [part.replace(f"{name}/", meaning).replace(name, meaning) for part in parts]
    return [part.strip() for part in parts]


def configurations() -> list[Bad]:
    """The arguments that `cgrpo config --check` and `cgrpo train` must refuse alike."""
    found = [Bad("a YAML file", (yaml_name(what),)) for what in YAML]
    for kind, table in (("a value", SETTINGS), ("an argument", ARGUMENTS)):
        for settings, values in table.items():
            pairs = [f"{setting}={value}" for value in told(values) for setting in settings.split()]
            found += [Bad(kind, (pair,)) for pair in pairs if pair not in FINE]
    found += [Bad("an override", (override,)) for override in OVERRIDES]
    return found + [Bad("a file", tuple(shlex.split(line))) for line in told(FILES)]


FINE = {
    f"{setting}=null"
    for setting in (
        "data.eval", "output", "evaluation.base", "method.clip_range", "method.ratio_norm", "training.old_log_probs",
        "rollout.share_initial_noise", "rollout.dynamics", "rollout.steps",
    )
}  # fmt: skip
"""What the tables cross and is allowed."""
UNREAD = (
    "rollout",
    "method",
    "objective",
    "training",
    "checkpoint",
    "evaluation.base",
    "tracking",
    "output",
    "rewards={",
)
"""Sections that other commands than train do not read to the end."""


def command_lines() -> list[Bad]:
    """Every bad command line, those of the configurations for one command after the other."""
    given = configurations()
    found = [Bad(bad.kind, (*command.split(), *bad.words)) for command in ("config --check", "train") for bad in given]
    for command in ("eval", "probe", "rewards check"):
        read = [bad for bad in given[::12] if not bad.words[0].startswith(UNREAD)]
        found += [Bad(bad.kind, (*command.split(), *bad.words)) for bad in read]
    lines = [line.format(shlex.quote(folder)) for folder in told(FOLDERS.replace("''", "")) for line in told(OF_FOLDER)]
    found += [Bad("a folder", tuple(shlex.split(line))) for line in lines]
    commands = [f"{command} {line}" for command, lines in COMMANDS.items() for line in told(lines)]
    return found + [Bad("a command", tuple(shlex.split(line))) for line in commands]


def yaml_name(what: str) -> str:
    return f"yaml/{what.replace(' ', '-')}.yaml"


# ---- the folder in which they are given

TEXTS = {
    "empty.yaml": "", "text.txt": "a {subject} on the beach\n", "notes": "a file\n", "bad.json": '{"a": ',
    "old.safetensors": "old", "empty.jsonl": "", "broken.jsonl": '{"id": 1}\n', "full/there.txt": "something\n",
    "grid.yaml": "seeds: [0]\nconfig: {training: {iterations: 1}}\n",
    "data.jsonl": '{"id": 1, "prompt": "a dog", "references": ["photo.png"]}\n',
    "unknown.jsonl": '{"id": 1, "prompt": "a", "references": ["nowhere.png"]}\n',
    "headless/transformer/config.json": "{}", "garbled/model_index.json": "{", "garbled/config.json": "{",
    "weightless/model_index.json": '{"_class_name": "FluxKontextPipeline"}', "weightless/config.json": "{}",
    "other/model_index.json": '{"_class_name": "FluxPipeline"}', "listed/model_index.json": "[1]",
    "foreign/model_index.json": '{"_class_name": "FluxKontextPipeline", "vae": ["mine", "Vae"]}',
    "probes/cut/probe.json": "{", "probes/listed/probe.json": "[1]", "probes/empty/probe.json": "",
    "probes/hollow/probe.json": '{"settings": {}}', "probes/hollow/config.yaml": "",
    "probes/bare/probe.json": "{}", "probes/bare/config.yaml": "",
    "probes/wrong/probe.json": '{"settings": 5}', "probes/wrong/config.yaml": "seed: 0\n",
    "probes/odd/probe.json": '{"settings": {"branches": "x"}}', "probes/odd/config.yaml": "seed: 0\n",
    "compares/cut/compare.yaml": "seeds: [", "compares/empty/compare.yaml": "",
    "compares/set/compare.yaml": "seeds: !!set {1}\n", "compares/odd/compare.yaml": "methods: {a: 1}\n",
    "benches/cut/bench.json": "{", "benches/listed/bench.json": "[1]", "benches/listed/tasks.json": "[]",
    "benches/empty/bench.json": "", "benches/bare/bench.json": "{}", "benches/bare/tasks.json": "[{}]",
    "benches/odd/bench.json": '{"identity": {"metrics": [5], "images": "x"}}', "benches/odd/tasks.json": "{}",
    "runs/notes": "a file\n",
}  # fmt: skip
CONFIGS = {
    "hollow": b"", "listed": b"- 1\n", "damaged": b"seed: [", "binary": b"\xff\xfe\xfd", "wrong": b"seed: abc\n",
    "foreign": b"policy: {use: 'mine:Policy'}\n", "set": b"rewards: !!set {a}\n", "odd": b"nothing: 1\n",
    "cut": None, "blank": None, "unseen": None, "folder": None,
}  # fmt: skip
"""config.yaml of copies of a run; None is that of the run."""


def make_place(place: Path) -> None:
    """Make everything that the command lines name, and nothing that they make."""
    place.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), "orange").save(place / "photo.png")
    for name, text in TEXTS.items():
        write(place / name, text.encode())
    for what, content in YAML.items():
        write(place / yaml_name(what), content)
    for folder in ("subjects/dog", "subjects/cat", f"odd/d{HALF}g"):
        (place / folder).mkdir(parents=True)
        shutil.copy(place / "photo.png", place / folder)
    shutil.copytree(RUN, place / "run")
    for name, content in CONFIGS.items():
        shutil.copytree(RUN, place / "runs" / name)
        if content is not None:
            write(place / "runs" / name / "config.yaml", content)
    checkpoint = "checkpoints/iteration-000002"
    write(place / "runs/cut" / checkpoint / "state.json", b"{")
    write(place / "runs/blank" / checkpoint / "config.yaml", b"- 1\n")
    shutil.rmtree(place / "runs/unseen/checkpoints")
    (place / "runs/folder/config.yaml").unlink()
    (place / "runs/folder/config.yaml").mkdir()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def snapshot(place: Path) -> Mapping[str, int]:
    """When each file and folder below was changed."""
    return {str(path.relative_to(place)): path.lstat().st_mtime_ns for path in place.rglob("*")}


# ---- running them


class Loaded(BaseException):
    """Weights were about to be loaded, or a run to start."""


@dataclass(frozen=True)
class Outcome:
    """What a command line came to."""

    status: Any
    """The exit status; None if an error came through."""
    said: str
    """Standard error."""
    error: BaseException | None = None

    @property
    def wrong(self) -> str:
        """What is not as it should be; "" if it was refused in one sentence, or by typer for how it is spelled."""
        if self.error is not None:
            return "it went on to load weights" if isinstance(self.error, Loaded) else f"traceback: {self.error!r:.300}"
        if self.status != 2:
            return f"exit status {self.status}"
        if any(sign in self.said for sign in ("Traceback", "validation error", "pydantic", "errno")):
            return "the sentence is not for users"
        spelled = "Usage: " in self.said or "─ Error ─" in self.said  # typer's own
        if not spelled and not (self.said.startswith("error: ") and self.said.count("\n") == 1):
            return "there is not one sentence"
        return ""


@contextlib.contextmanager
def nothing_is_loaded() -> Iterator[None]:
    """Inside it, whatever loads weights or begins a run raises `Loaded`."""
    from customized_grpo.policies.pipeline import PipelinePolicy
    from customized_grpo.rewards import clip, dino
    from customized_grpo.studies.compare import cells
    from customized_grpo.train.trainer import Trainer

    def refuse(*given: Any, **named: Any) -> Any:
        raise Loaded

    owners = (PipelinePolicy, "load_pipeline"), (Trainer, "train"), (clip, "load"), (dino, "load"), (cells, "run_cells")
    with ExitStack() as patches:
        for owner, name in owners:
            patches.enter_context(patch.object(owner, name, refuse))
        yield


def run(words: tuple[str, ...]) -> Outcome:
    """`cgrpo WORDS` in this process and the current folder."""
    from customized_grpo.cli.main import main as cgrpo

    error, said = io.StringIO(), io.StringIO()
    path, status, raised = list(sys.path), None, None
    with ExitStack() as kept:
        kept.enter_context(patch.dict(os.environ))
        kept.enter_context(patch.object(sys, "argv", ["cgrpo", *words]))
        kept.enter_context(contextlib.redirect_stdout(said))
        kept.enter_context(contextlib.redirect_stderr(error))
        kept.enter_context(warnings.catch_warnings())
        try:
            cgrpo(_command())
        except SystemExit as ended:
            status = ended.code
        except BaseException as other:
            raised = other
    sys.path[:] = path
    return Outcome(status, error.getvalue() or said.getvalue(), raised)


@cache
def _command() -> Any:
    """`cgrpo`, which typer would make anew for each line."""
    from customized_grpo.cli.main import app

    return typer.main.get_command(app)


def main() -> int:
    wanted, failed = sys.argv[1:], 0
    chosen = [bad for bad in command_lines() if not wanted or any(word in str(bad) for word in wanted)]
    with tempfile.TemporaryDirectory() as folder, nothing_is_loaded():
        os.environ["XDG_STATE_HOME"], os.environ["HF_HUB_OFFLINE"] = f"{folder}/state", "1"
        place = Path(folder) / "place"
        make_place(place)
        os.chdir(place)
        before = snapshot(place)
        for bad in chosen:
            outcome = run(bad.words)
            before, written = snapshot(place), set(snapshot(place).items()) ^ set(before.items())
            wrong = outcome.wrong or (f"it wrote {sorted(written)[0][0]}" if written else "")
            failed += bool(wrong)
            shown = f"cgrpo {bad}\n    {outcome.said.strip()}{f' <- WRONG: {wrong}' if wrong else ''}"
            print(shown.encode("utf-8", "backslashreplace").decode())
        os.chdir(folder)
    print(f"{len(chosen)} command lines, {failed} not refused as they should be")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
