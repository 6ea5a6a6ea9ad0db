"""Token files and texts that a checkpoint reads."""

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from arena.checkpoints import CheckpointError
from arena.checkpoints.tokens import read_tokens


def test_token_files(tmp_path):
    ids = np.arange(23) % 20
    np.save(tmp_path / "a.npy", ids.astype(np.uint16))
    np.save(tmp_path / "rows.npy", ids[:20].reshape(2, 10))
    save_file({"tokens": torch.from_numpy(ids)}, tmp_path / "b.safetensors")
    save_file({"x": torch.from_numpy(ids[:20]).view(4, 5)}, tmp_path / "rows.safetensors")
    pl.DataFrame({"tokens": ids, "other": 1.5}).write_parquet(tmp_path / "c.parquet")
    pl.DataFrame({"tokens": [ids[:9].tolist(), [], ids[9:].tolist()]}).write_parquet(
        tmp_path / "lists.parquet"
    )
    for name in ("a.npy", "rows.npy", "b.safetensors", "rows.safetensors", "c.parquet", "lists.parquet"):
        found = read_tokens(tmp_path / name, vocab_size=20, length=5, sequences=3)
        assert found.dtype == torch.int64 and found.shape == (3, 5), name
        assert found.flatten().tolist() == ids[:15].tolist(), name
    assert read_tokens(tmp_path / "a.npy", vocab_size=20, length=50, sequences=3).shape == (1, 23)
    (tmp_path / "text.txt").write_text("Ünder")
    found = read_tokens(tmp_path / "text.txt", vocab_size=256, length=3, sequences=1)
    assert found.tolist() == [list("Ünder".encode()[:3])]


def test_token_files_that_cannot_be_read(tmp_path):
    def refuse(name, text, vocab_size=20, tokenizer=None):
        with pytest.raises(CheckpointError, match=text):
            read_tokens(tmp_path / name, vocab_size=vocab_size, length=4, sequences=2, tokenizer=tokenizer)

    refuse("none.npy", "is no file")
    np.save(tmp_path / "a.npy", np.array([1, 20]))
    refuse("a.npy", "the token 20; the model knows 0 to 19")
    np.save(tmp_path / "a.npy", np.array([1, -1]))
    refuse("a.npy", "the token -1")
    np.save(tmp_path / "a.npy", np.array([1.0]))
    refuse("a.npy", "float64, not integers")
    np.save(tmp_path / "a.npy", np.array([], dtype=np.int64))
    refuse("a.npy", "no token")
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    refuse("a.npy", "no array that can be read")
    (tmp_path / "a.pt").write_bytes(b"")
    refuse("a.pt", "is not read")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    refuse("a.parquet", "cannot be read")
    pl.DataFrame({"tokens": ["a"]}).write_parquet(tmp_path / "a.parquet")
    refuse("a.parquet", "not of integers")
    (tmp_path / "a.txt").write_text("text")
    refuse("a.txt", "too few for bytes")
    refuse("a.txt", "tokenizers|tokenizer.json cannot be read", tokenizer="{}")


def test_text_by_the_tokenizer_of_the_checkpoint(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    words = {word: index for index, word in enumerate(["[UNK]", "a", "b", "c"])}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "text.txt").write_text("a b c d\n" * 30_000)
    found = read_tokens(tmp_path / "text.txt", vocab_size=4, length=8, sequences=2, tokenizer=own.to_str())
    assert found.tolist() == [[1, 2, 3, 0] * 2] * 2
