"""Model families. Names are imported when they are first used."""

from customized_grpo.stubs import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
