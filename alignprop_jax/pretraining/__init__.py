"""The data set, captions and tokenizer that the package's own `emoji` model is trained with."""
