"""tokenizer.json without tokenizer.model: special tokens from the files beside it, rows as text, saving."""

import json
import sys

import pytest
from conftest import TEXT, write_json_tokenizer

from data import IGNORE, encode_prefix, encode_segment
from formats.tokenizer_json import JSONTokenizer
from llama import read_tokenizer
from model import LocVLM

pytest.importorskip("tokenizers", reason="pip install tokenizers")


@pytest.mark.parametrize("kind, bos", [("smollm2", None), ("llama3", 0)])
def test_a_folder_with_tokenizer_json_alone_is_read(tmp_path, kind, bos):
    """SmolLM2 names a bos and never uses it, LLaMA-3 puts one before each text. Text survives its ids."""
    write_json_tokenizer(tmp_path, kind)
    tokenizer = read_tokenizer(tmp_path)
    assert isinstance(tokenizer, JSONTokenizer)
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (380, bos, 1)
    for text in ("It is located at (4, 52, 13, 63)", " two  spaces, été, 東京, 🙂\n", ""):
        assert tokenizer.decode([0, -200, *tokenizer.encode(text), 1, 9999]) == text


@pytest.mark.parametrize("kind", ["smollm2", "llama3"])
def test_a_row_reads_as_one_text(tmp_path, kind):
    """Behind ASSISTANT:, an answer gets the space that sentencepiece adds by itself: the ids are those of the whole text."""
    tokenizer = write_json_tokenizer(tmp_path, kind)
    ids, labels = encode_segment(tokenizer, "v1", [("What?", "It is red."), ("Where?", "There.")], "\n")
    answers = [" It is red.", " There."]
    parts = ["\nWhat? ASSISTANT:", answers[0], "USER: Where? ASSISTANT:", answers[1]]
    assert ids == sum((tokenizer.encode(part) + [1] * (part in answers) for part in parts), [])
    assert tokenizer.encode(parts[0] + parts[1]) == tokenizer.encode(parts[0]) + tokenizer.encode(parts[1])
    assert tokenizer.decode([i for i in labels if i != IGNORE]) == "".join(answers)
    assert encode_prefix(tokenizer, "v1", 0)[0] == (0 if kind == "llama3" else tokenizer.encode("A")[0])


def test_where_special_tokens_are_named(tmp_path):
    """eos in tokenizer_config.json, in special_tokens_map.json, or the first of config.json's; add_bos_token decides on bos."""
    write_json_tokenizer(tmp_path, "llama3")
    named = tmp_path / "tokenizer_config.json"
    named.write_text('{"add_bos_token": false, "eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"}')
    assert (JSONTokenizer(tmp_path).bos_token_id, JSONTokenizer(tmp_path).eos_token_id) == (None, 1)
    named.unlink()
    with pytest.raises(ValueError, match="tokenizer.json: no end token"):
        JSONTokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|begin_of_text|>"}}')
    assert (JSONTokenizer(tmp_path).bos_token_id, JSONTokenizer(tmp_path).eos_token_id) == (0, 0)
    (tmp_path / "special_tokens_map.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": [7, 8]}}')
    assert JSONTokenizer(tmp_path).eos_token_id == 7


def test_what_is_no_tokenizer_json_is_refused(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        read_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        read_tokenizer(tmp_path)


def test_a_model_with_it_is_saved_and_comes_back(make_model, tmp_path):
    """The file is written as it was, but for one word: LLaVA's chunks each get their space, and others shall read them so."""
    model = make_model(tokenizer=write_json_tokenizer(tmp_path / "smollm2", "smollm2"))
    model.save_pretrained(tmp_path / "run")
    again = LocVLM.from_pretrained(tmp_path / "run")
    again.save_pretrained(tmp_path / "run")
    files = [tmp_path / folder / "tokenizer.json" for folder in ("smollm2", "run")]
    assert files[0].read_bytes() == files[1].read_bytes() and not (tmp_path / "run/tokenizer.model").exists()
    again = LocVLM.from_pretrained(tmp_path / "run").tokenizer
    assert (len(again), again.bos_token_id, again.eos_token_id) == (380, None, 1)
    assert json.loads((tmp_path / "run/config.json").read_text())["image_token_index"] == 380 < TEXT.vocab_size

    content = json.loads(files[0].read_text())
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    added = [*content["added_tokens"], {**content["added_tokens"][0], "id": 380, "content": "<image>"}]
    files[0].write_text(json.dumps(content | {"pre_tokenizer": metaspace, "added_tokens": added}))
    make_model(tokenizer=JSONTokenizer(tmp_path / "smollm2")).save_pretrained(tmp_path / "llava")
    assert json.loads((tmp_path / "llava/tokenizer.json").read_text())["pre_tokenizer"]["prepend_scheme"] == "always"
    assert LocVLM.from_pretrained(tmp_path / "llava").tokenizer.image_token_id == 380
    assert json.loads((tmp_path / "llava/config.json").read_text())["image_token_index"] == 380
