"""Can the tests fail? Change the source in small ways, one at a time, and run the mirrored tests on every change.

    python tools/mutants [--size 450] [--jobs 2] [--only functional]

runs a seeded sample of mutants and the faults of faults.yaml, then prints the tables of docs/testing.md. A run that was
stopped goes on where it was. Survivors need a reason in survivors.yaml, which also says which are equivalent: no test
could tell them from the source.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import yaml
from generate import FAULT, FILES, ROOT, Mutant, faults, sample
from sandbox import Sandbox, state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=450, help="mutants in the sample; 0 takes all there are")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", default="", help="files whose name has this in it")
    parser.add_argument("--survivors", action="store_true", help="only those that survived when they were last run")
    parser.add_argument("--record", type=Path, default=ROOT / ".mutants.jsonl", help="one line for every result")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables of the record")
    options = parser.parse_args()
    plan = faults(options.only) + sample(options.size, options.seed, options.only)
    if options.survivors:
        last = {line["key"]: line["outcome"] for line in lines(options.record)}
        plan = [mutant for mutant in plan if last.get(mutant.key) == "survived"]
    done = read(options.record)
    waiting = [mutant for mutant in plan if mutant.key not in done]
    print(
        f"{len(plan)} mutants and faults, of which {len(plan) - len(waiting)} have a result in {options.record}. "
        f"Results are added there one by one: stop at any time, the next run goes on.",
        file=sys.stderr,
    )
    if waiting and not options.table:
        random.Random(options.seed).shuffle(waiting)
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        workers = [fork(waiting[job :: options.jobs], options.record) for job in range(options.jobs)]
        codes = [os.waitpid(worker, 0)[1] for worker in workers]
        if any(codes):
            sys.exit("A worker failed; what it said is above. What was finished is in the record.")
    print(tables(plan, read(options.record)))


def lines(record: Path) -> list[dict]:
    """All results, except for a line that was cut off when the run was stopped."""
    text = record.read_text(encoding="utf-8") if record.is_file() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def read(record: Path) -> dict[str, dict]:
    """The results that still hold, by the mutant's key."""
    current = {file: state(file) for file in [*FILES, "train/trainer.py"]}
    return {line["key"]: line for line in lines(record) if current.get(line["file"]) == line["state"]}


def fork(mutants: list[Mutant], record: Path) -> int:
    """A process that runs the mutants and adds the results to the record."""
    if worker := os.fork():
        return worker
    code = 1
    try:
        with tempfile.TemporaryDirectory() as folder, record.open("a", encoding="utf-8") as out:
            sandbox = Sandbox(Path(folder))
            for number, (key, file, changed) in enumerate(mutants, 1):
                result = {"key": key, "file": file, "state": state(file, sandbox.folder), **sandbox.run(file, changed)}
                out.write(json.dumps(result) + "\n")
                out.flush()
                print(f"{number}/{len(mutants)} {result['outcome']} in {result['seconds']} s: {key}", file=sys.stderr)
        code = 0
    except RuntimeError as error:
        print(error, file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def share(successes: int, trials: int) -> str:
    """In percent, with Wilson's 95 % interval."""
    if not trials:
        return ""
    z, found = 1.96, successes / trials
    centre, scale = found + z**2 / (2 * trials), 1 + z**2 / trials
    reach = z * math.sqrt(found * (1 - found) / trials + z**2 / (4 * trials**2))
    return f"{found:.1%} ({(centre - reach) / scale:.1%} to {min(1.0, (centre + reach) / scale):.1%})"


def tables(plan: list[Mutant], done: dict[str, dict]) -> str:
    """Markdown: how many mutants of every file were killed, what killed each fault, and the survivors with reasons."""
    reasons = yaml.safe_load((Path(__file__).parent / "survivors.yaml").read_text(encoding="utf-8"))
    same = {key for reason in reasons if reason["equivalent"] for key in reason["mutants"]}
    run = {mutant.key: done[mutant.key] for mutant in plan if mutant.key in done}
    mutants = [result for key, result in run.items() if not key.startswith(FAULT)]
    text = [
        "| file | mutants | killed | of them by time | equivalent | other survivors | killed of those not equivalent |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in [*dict.fromkeys(result["file"] for result in mutants), ""]:
        results = [result for result in mutants if row in ("", result["file"])]
        count = Counter(
            "equivalent" if r["key"] in same and r["outcome"] == "survived" else r["outcome"] for r in results
        )
        killed = count["killed"] + count["timeout"]
        numbers = len(results), killed, count["timeout"], count["equivalent"], count["survived"]
        cells = [row or "all files", *map(str, numbers), share(killed, len(results) - count["equivalent"])]
        text.append(f"| {' | '.join(cells)} |")
    text += ["", "| fault | in | fails |", "|---|---|---|"]
    text += [
        f"| {key.removeprefix(FAULT)} | `{result['file']}` | {result.get('by', result['outcome'])} |"
        for key, result in run.items()
        if key.startswith(FAULT)
    ]
    unexplained = {key for key, result in run.items() if result["outcome"] == "survived"}
    for reason in reasons:
        survived = [key for key in reason["mutants"] if key in unexplained]
        unexplained -= set(survived)
        if survived:
            text += ["", f"{'Equivalent' if reason['equivalent'] else 'Harmless'}: {reason['reason']}", ""]
            text += [f"* `{key}`" for key in survived]
    if unexplained:
        text += ["", "**Without a reason in survivors.yaml:**", "", *(f"* `{key}`" for key in sorted(unexplained))]
    minutes = sum(result["seconds"] for result in run.values()) / 60
    text += ["", f"{len(run)} of {len(plan)} mutants and faults were run, in {minutes:.0f} minutes of processor time."]
    return "\n".join(text)


if __name__ == "__main__":
    main()
