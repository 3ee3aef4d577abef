import torch

from customized_grpo.policies.encodings import EncodingCache, digest

from . import tiny


def test_the_least_recently_used_make_room():
    cache = EncodingCache(limit=3 * 8)
    made: list[str] = []

    def row(key: str):
        return cache.get(key, lambda: made.append(key) or {"x": torch.zeros(2)})

    for key in "abcadb":  # d pushes b out, because a was used again
        row(key)
    assert "".join(made) == "abcdb"
    assert cache.bytes == 3 * 8
    cache.get("large", lambda: {"x": torch.zeros(100)})
    assert "large" not in cache
    assert cache.bytes == 0


def test_equal_pictures_have_equal_digests():
    assert digest(tiny.picture(seed=1)) == digest(tiny.picture(seed=1))
    assert digest(tiny.picture(seed=1)) != digest(tiny.picture(seed=2))
    assert digest(tiny.picture((8, 32))) != digest(tiny.picture((32, 8)))
