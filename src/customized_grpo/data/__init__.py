"""Examples, their images and masks, importers, and checks."""

from customized_grpo.stubs import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
