"""Tokenizers that are a tokenizer.json, no tokenizer.model (LLaMA-3, SmolLM2, Qwen2), through the package `tokenizers`."""

from formats.files import import_package, naming, read_json, require_file


class JSONTokenizer:
    """A tokenizer.json behind the interface of llama.Tokenizer. Its special tokens are named in the files beside it."""

    def __init__(self, folder):
        self.path = require_file(f"{folder}/tokenizer.json", "the tokenizer that belongs to the weights")
        tokenizers = import_package("tokenizers", f"{self.path} is read by a package of its own")
        with naming(self.path, Exception):  # the package has no class of its own
            self._model = tokenizers.Tokenizer.from_file(str(self.path))
        self._model.no_padding()
        self._model.no_truncation()
        self._length = 1 + max(self._model.get_vocab().values())
        named, config = {}, {}
        for name, values in (("special_tokens_map.json", named), ("tokenizer_config.json", named), ("config.json", config)):
            path = self.path.with_name(name)
            values.update(read_json(path) if path.is_file() else {})
        self.eos_token_id = self.find(named.get("eos_token"))
        if self.eos_token_id is None:  # the first, if there are several
            ids = {**config, **(config.get("text_config") or {})}.get("eos_token_id")
            self.eos_token_id = ids[0] if isinstance(ids, list) and ids else ids
        if self.eos_token_id is None:
            raise ValueError(f"{self.path}: no end token; name it as eos_token in tokenizer_config.json beside it")
        # bos is what the tokenizer puts before a text by itself: many name one that they never use
        text, whole = self.encode("a"), self._model.encode("a").ids
        self.bos_token_id = whole[0] if whole[: len(text)] != text else None
        if named.get("add_bos_token") is not None:
            self.bos_token_id = self.find(named.get("bos_token")) if named["add_bos_token"] else None
        self.image_token_id = self.find("<image>")  # of a LLaVA
        self.space = "" if self.encode("a a") == 2 * text else " "

    def __len__(self):
        return self._length

    def find(self, token):
        """Return the id of a special token, a text or an object with its content, or None."""
        content = token.get("content") if isinstance(token, dict) else token
        return self._model.token_to_id(content) if content else None

    def encode(self, text):
        """Text -> ids, without bos and eos. Special tokens that are spelled out in it are read as such."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> text, without special tokens. Ids outside the vocabulary are dropped."""
        return self._model.decode([i for i in ids if 0 <= i < len(self)])

    def piece(self, i):
        return self._model.id_to_token(i)
