"""Whether a tokenizer and a text encoder belong together."""

from typing import TYPE_CHECKING

from alignprop_jax.errors import UserError
from alignprop_jax.models.clip import CLIPTextConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", encoder: CLIPTextConfig, origin: str
) -> None:
    """Refuses a tokenizer whose ids or lengths the encoder has no embedding for.

    Those that are out of bounds would be read as NaN.

    Args:
        origin: what holds both, and which of its encoders it is, for errors.

    Raises:
        UserError: an id, of an added token maybe, is beyond the vocabulary; or prompts may have
            more tokens than the encoder has positions.
    """
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= encoder.vocab_size:
        raise UserError(
            f"{origin}: the tokenizer has ids up to {highest}, added tokens included, and the text "
            f"encoder knows those below vocab_size={encoder.vocab_size}; they do not belong "
            "together"
        )
    if tokenizer.model_max_length > encoder.max_length:
        raise UserError(
            f"{origin}: the tokenizer's model_max_length={tokenizer.model_max_length} is more than "
            f"the text encoder's max_position_embeddings={encoder.max_length}; lower it in "
            "tokenizer_config.json"
        )
