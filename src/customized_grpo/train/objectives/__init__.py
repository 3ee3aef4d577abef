"""What a policy is trained on: each objective samples, keeps what it needs, and gives the loss of a micro-batch."""

from customized_grpo.train.objectives.contract import MicroBatch, Objective, Plan, make_objective

__all__ = ["MicroBatch", "Objective", "Plan", "make_objective"]
