from pathlib import Path

import pytest

from bc2exp.config.errors import UserError
from bc2exp.embedded import TOKENIZER
from bc2exp.text.tokenizer import Tokenizer, find_tokenizer
from tests.shared_data import shared_data


def test_documents_are_encoded_alike_in_batches_and_alone() -> None:
    tokenizer = Tokenizer(TOKENIZER)
    texts = [f"第{n}份外卖 came late, {n} minutes.\t" for n in range(2500)]  # more than one batch
    together = [list(ids) for ids in tokenizer.encode_documents(texts)]
    assert together == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in together] == texts


def test_nothing_is_added_and_marks_in_the_text_stay_text() -> None:
    tokenizer = Tokenizer(TOKENIZER)
    ids = tokenizer.encode("<s>你好</s>")
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == "<s>你好</s>"


def test_the_genuine_tokenizer() -> None:
    tokenizer = Tokenizer(shared_data("tokenizer/baichuan2_tokenizer.model"))
    assert tokenizer.vocab_size == 125_696
    assert tokenizer.eos_id == 2
    expected = [54278, 2435, 92743, 92323, 5592, 16903, 92323, 8429, 93551]
    assert tokenizer.encode("送餐特别快,态度也好,辛苦啦") == expected
    assert tokenizer.encode("积极") == [2652]
    assert tokenizer.encode("消极") == [28211]


@pytest.mark.parametrize("content", [b"", b"no model", b"\x00" * 64])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model") as error:
        Tokenizer(file)
    assert "\n" not in str(error.value)


def test_which_tokenizer_a_configuration_means(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert find_tokenizer(None, None) == TOKENIZER
    assert find_tokenizer(str(tmp_path), None) == tmp_path / "tokenizer.model"
    assert find_tokenizer(str(tmp_path / "tokenizer.model"), None) == tmp_path / "tokenizer.model"
    assert find_tokenizer(None, str(tmp_path)) == tmp_path / "tokenizer.model"
    assert find_tokenizer(None, str(tmp_path / "elsewhere")) == TOKENIZER
