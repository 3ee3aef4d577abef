import pytest
from rich.console import Console

from customized_grpo.cli.generation import evaluate_command
from customized_grpo.errors import UserError


def test_an_evaluation_of_no_examples_is_refused() -> None:
    with pytest.raises(UserError, match=r"nothing to evaluate: evaluation.examples is 0"):
        evaluate_command(Console(quiet=True), None, ["evaluation.examples=0"], None, None, None)
