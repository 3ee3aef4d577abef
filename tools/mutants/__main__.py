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
from generate import FILES, ROOT, Mutant, faults, sample
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
    if not options.table:
        done = read(options.record)
        waiting = [mutant for mutant in plan if mutant.key not in done]
        random.Random(options.seed).shuffle(waiting)
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        workers = [fork(waiting[job :: options.jobs], options.record) for job in range(options.jobs)]
        codes = [os.waitpid(worker, 0)[1] for worker in workers]
        if any(codes):
            sys.exit("A worker failed; what it said is above. What was finished is in the record.")
    print(tables(plan, read(options.record)))


def lines(record: Path) -> list[dict]:
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()] if record.is_file() else []


def read(record: Path) -> dict[str, dict]:
    """The results that still hold, by the mutant's key."""
    current = {file: state(file) for file in [*FILES, "trainer.py"]}
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


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z, share = 1.96, successes / trials
    centre = share + z**2 / (2 * trials)
    reach = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return (centre - reach) / (1 + z**2 / trials), min(1.0, (centre + reach) / (1 + z**2 / trials))


def tables(plan: list[Mutant], done: dict[str, dict]) -> str:
    """Markdown: how many mutants of every file were killed, and the survivors with their reasons."""
    reasons = yaml.safe_load((Path(__file__).parent / "survivors.yaml").read_text(encoding="utf-8")) or []
    equivalent = {key for reason in reasons if reason["equivalent"] for key in reason["mutants"]}
    by_file: dict[str, list[Mutant]] = {"all files": []}
    for mutant in plan:
        made_by_hand = mutant.key.startswith("fault: ")
        for row in ["faults made by hand"] if made_by_hand else [mutant.file, "all files"]:
            if mutant.key in done:
                by_file.setdefault(row, []).append(mutant)
    text = [
        "| file | mutants | killed | of them by time | equivalent | other survivors | killed of those not equivalent |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for file, mutants in sorted(by_file.items(), key=lambda row: (" " in row[0], row[0])):
        outcomes = Counter(done[mutant.key]["outcome"] for mutant in mutants)
        same = sum(done[m.key]["outcome"] == "survived" and m.key in equivalent for m in mutants)
        killed = outcomes["killed"] + outcomes["timeout"]
        low, high = wilson(killed, len(mutants) - same)
        text.append(
            f"| {file} | {len(mutants)} | {killed} | {outcomes['timeout']} | {same} | {outcomes['survived'] - same} "
            f"| {killed / (len(mutants) - same):.1%} ({low:.1%} to {high:.1%}) |"
        )
    unexplained = {mutant.key for mutant in plan if done.get(mutant.key, {}).get("outcome") == "survived"}
    for reason in reasons:
        survived = [key for key in reason["mutants"] if key in unexplained]
        unexplained -= set(survived)
        if survived:
            text += ["", f"{'Equivalent' if reason['equivalent'] else 'Harmless'}: {reason['reason']}", ""]
            text += [f"* `{key}`" for key in survived]
    if unexplained:
        text += ["", "**Without a reason in survivors.yaml:**", "", *(f"* `{key}`" for key in sorted(unexplained))]
    if missing := sum(mutant.key not in done for mutant in plan):
        text += ["", f"**{missing} of {len(plan)} have not been run.**"]
    return "\n".join(text)


if __name__ == "__main__":
    main()
