"""Terminal output of `cgrpo train`: a summary, live progress, and the changes. No live progress without a terminal."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from customized_grpo import page
from customized_grpo.cli.terminal import new_console
from customized_grpo.errors import UserError
from customized_grpo.page.formats import summary, words
from customized_grpo.shell import command, program
from customized_grpo.store.run import read_run
from customized_grpo.store.scores import Scores
from customized_grpo.studies.report.alarms import alarms
from customized_grpo.studies.report.run import STAGES, compared
from customized_grpo.studies.report.verdict import Verdict, kind_name
from customized_grpo.train.evaluation import Evaluation
from customized_grpo.train.preflight import Summary
from customized_grpo.train.settings import VERIFIED
from customized_grpo.train.trainer import Observer, Result


class Display(Observer):
    """A summary, live progress and evaluations in the terminal, and at the end the report with its plots.

    Args:
        console: to print on; None is the terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or new_console()
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.rewards: tuple[str, ...] = ()
        self.report: Path | None = None

    def on_start(self, summary: Summary) -> None:
        self.rewards = summary.rewards
        share = summary.trainable_parameters / summary.total_parameters
        facts = {
            "run": str(summary.run),
            "model": f"{summary.model} on {summary.device}, {summary.trainable_parameters:,} of "
            f"{summary.total_parameters:,} parameters trainable ({share:.1%})",
            "rewards": ", ".join(summary.rewards),
            "work": f"{summary.iterations - summary.start_iteration} iterations x {summary.samples_per_iteration} "
            f"images on {summary.processes} process{'es' if summary.processes > 1 else ''}"
            + ("" if summary.expected_seconds is None else f", about {duration(summary.expected_seconds)}"),
            "memory": f"about {summary.memory}" if summary.memory else "",
            "verified": VERIFIED.get(summary.verified or "", summary.verified or ""),
            "resumed": f"after iteration {summary.start_iteration}" * bool(summary.start_iteration),
        }
        page.show_block(self.console, page.Facts(list(facts.items())))
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[numbers]}", markup=False),
                TextColumn("{task.fields[seconds]}", "dim", markup=False), console=self.console,
            )  # fmt: skip
            self.progress.start()
            self.task = self.progress.add_task(
                "starting", total=summary.iterations, completed=summary.start_iteration, numbers="", seconds=""
            )

    def on_stage(self, stage: str) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, description=f"{stage:<10}")

    def on_iteration(self, record: Mapping[str, float]) -> None:
        rewards = "  ".join(f"{name} {record[f'reward/{name}/mean']:.3f}" for name in self.rewards)
        conflict = f"  conflict {record['conflict/share']:.0%}" if "conflict/share" in record else ""
        seconds = " ".join(f"{s} {record[f'seconds/{s}']:.1f}" for s in STAGES if record[f"seconds/{s}"] >= 0.05)
        if self.progress is not None and self.task is not None:
            self.progress.update(
                self.task, completed=record["iteration"], numbers=f"{rewards}{conflict}", seconds=f"s: {seconds}"
            )

    def on_evaluation(self, evaluation: Evaluation) -> None:
        scores = evaluation.scores
        show_scores(self.console, f"held-out, iteration {scores.iteration:>3}", scores)

    def on_end(self, run: Path, status: str) -> None:
        from customized_grpo.studies.report import write_report

        try:
            self.report = write_report(run, status)
        except (UserError, OSError) as error:  # the run is complete without its report
            self.console.print(f"The report could not be written: {error}")

    def on_stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def show_scores(console: Console, label: str, scores: Scores) -> None:
    """Print the means of one evaluation, and below them those of every kind of prompt."""
    console.print(f"{label}: {summary(scores)}")
    kinds = scores.distinct_kinds()
    width = max((len(kind_name(kind)) for kind in kinds), default=0)
    for kind in kinds:
        console.print(f"  {kind_name(kind):<{width}}  {summary(scores, kind)}")


def show_verdict(console: Console, verdict: Verdict) -> None:
    """Print what two evaluations say: the headline, every metric with its interval, by kind, and alarms."""
    if not verdict.changes:
        return
    answer, _ = verdict.headline()
    console.print(answer, style="bold")
    title = "Held-out subjects, same prompts and noise: before → after, change [95 % interval]; * not trained on"
    page.show_block(console, replace(verdict.table(), title=title) if verdict.by_kind else changes_table(verdict))
    page.show_block(console, page.Remarks(alarms(verdict)))


def changes_table(verdict: Verdict) -> page.Table:
    """The metrics over all tasks, one a row."""
    rows = []
    for change in verdict.changes:
        name = words(change.metric) + ("" if change.metric in verdict.before.rewards else " (not trained on)")
        name += f" ({change.unscored} of {change.tasks + change.unscored} tasks unscored)" if change.unscored else ""
        before, after = (page.Plain(some.value, math.nan, math.nan) for some in (change.before, change.after))
        rows.append(page.Row(name, (before, after, change.difference)))
    title = "Held-out subjects, same prompts and noise; 95 % intervals below the change"
    return page.Table(("before", "after", "change"), rows, first="", title=title)


def show_result(console: Console, result: Result, report: Path | None) -> None:
    """Print the results, the paths of the outputs, and suggested next commands."""
    if result.changes and (verdict := compared(read_run(result.run))):
        show_verdict(console, verdict)
    if result.stopped_early:
        console.print("Stopped early: the held-out worst-reward gain no longer improved (training.early_stop).")
    if result.interrupted:
        console.print("Stopped; everything is saved. Resume with:", end=" ")
        console.print(command("train", "--resume", result.run), style="bold", soft_wrap=True)
    trained = adapter(result.run)
    kind = "weights" if trained and (trained / "transformer").is_dir() else "adapter"
    written = {"report": report, kind: trained, "images": result.run / "samples"}
    facts = [(name, str(path)) for name, path in written.items() if path is not None and path.exists()]
    if not result.interrupted:
        facts += [
            ("took", duration(result.seconds)),
            ("next", f"{command('generate', '--run', result.run)}      generate images"),
            ("", f"{program('tensorboard')} --logdir {shlex.quote(str(result.run))}      show the curves"),
        ]
    page.show_block(console, page.Facts(facts))


def adapter(run: Path) -> Path | None:
    found = sorted((run / "checkpoints").glob("iteration-*/adapter"))
    return found[-1] if found else None


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
