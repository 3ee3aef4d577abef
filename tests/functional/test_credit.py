import torch

from customized_grpo.functional.credit import final, stepwise


def test_a_step_gets_the_reward_of_the_image_or_what_it_adds() -> None:
    before, after = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[2.0], [5.0]]]])
    assert stepwise(before, after, after[:, :, -1]).tolist() == [[[[1.0], [3.0]]]]
    assert final(before, after, after[:, :, -1]).tolist() == [[[[5.0], [5.0]]]]
