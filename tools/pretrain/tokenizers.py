"""Word-level tokenizers for the vocabulary of the toy world. Other words become <unk>."""

from customized_grpo.toyworld.draw import SIZE
from customized_grpo.toyworld.world import VOCABULARY
from tools.pretrain.models import Tokenizer

MAX_TOKENS = 16


def build(*, begin: bool, size: int = SIZE) -> Tokenizer:
    """With `begin`, texts start with <bos> and end with <eos>, as in CLIP; without, they only end with <eos>, as in T5.

    "an" is a word for images above 64 pixels. <eos> has the largest id, because older CLIP configurations pool the
    text at the largest id.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ("<pad>", "<unk>", "<bos>", *VOCABULARY, *(("an",) if size > SIZE else ()), "<eos>")
    ids = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if begin else "$A <eos>",
        special_tokens=[("<bos>", ids["<bos>"]), ("<eos>", ids["<eos>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=MAX_TOKENS,
    )
