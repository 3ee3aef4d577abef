import torch

from customized_grpo.randomness import generator, normal


def test_a_draw_depends_on_its_key_alone() -> None:
    first = normal((3, 2), [("a", 1), ("a", 2)])
    torch.randn(5)
    again = normal((3, 2), [("a", 2), ("a", 1)]).flip(0)
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])


def test_numbers_and_words_are_different_keys() -> None:
    assert generator(1).initial_seed() != generator("1").initial_seed()


def test_noise_is_standard_normal() -> None:
    noise = normal((200,), [(i,) for i in range(200)])
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02


def test_seeds_are_the_same_on_every_machine() -> None:
    assert generator("initial", 0, 1, 2).initial_seed() == 1228814356355128988
