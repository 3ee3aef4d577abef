"""Word-level tokenizers over the vocabulary of the toy world; any other word becomes <unk>."""

from customized_grpo.toyworld.pretrain.models import Tokenizer
from customized_grpo.toyworld.world import VOCABULARY

MAX_TOKENS = 16


def build(*, begin: bool) -> Tokenizer:
    """CLIP's kind begins with <bos> and ends with <eos>; T5's kind only ends with <eos>.

    <eos> has the largest id, because CLIP pools its text at the largest id when eos_token_id is the old default.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ("<pad>", "<unk>", "<bos>", *VOCABULARY, "<eos>")
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
