from tests.lm.conftest import model, tokenizer  # noqa: F401
