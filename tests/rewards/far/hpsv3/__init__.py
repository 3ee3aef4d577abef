"""A stand-in with the interface of the hpsv3 package: `reward` gives (B, 2), a mean and a spread."""

import torch


class HPSv3RewardInferencer:
    def __init__(self, config_path=None, checkpoint_path=None, device="cuda", differentiable=False):
        self.checkpoint_path, self.device = checkpoint_path, device

    def reward(self, prompts, image_paths):
        means = [
            len(prompt) + picture.getpixel((0, 0))[0] for prompt, picture in zip(prompts, image_paths, strict=True)
        ]
        return torch.tensor([[mean, -1.0] for mean in means], dtype=torch.bfloat16)
