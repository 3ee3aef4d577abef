"""Training: rollout, advantages, update, evaluation, checkpoints, and the trainer that joins them."""
