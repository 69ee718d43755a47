"""Tokens as bytes and as text, for byte-level BPE and for SentencePiece tokenizers."""

import hashlib
import json
from collections.abc import Iterable

from transformers.convert_slow_tokenizer import bytes_to_unicode

SPACE = "\u2581"  # how SentencePiece writes a space; byte-level BPE never has this character in a token
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # byte-level BPE's alphabet, from GPT-2


def token_bytes(tokenizer, ids: Iterable[int]) -> dict[int, bytes | None]:
    """The bytes that each token stands for; None for an id that the tokenizer does not have (padding of the logits)."""
    added, backend = tokenizer.added_tokens_decoder, getattr(tokenizer, "backend_tokenizer", None)
    is_byte_level = backend is not None and "ByteLevel" in repr(backend.decoder)
    result = {}
    for token in ids:
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            result[token] = None
        elif token not in added and is_byte_level:
            result[token] = bytes(BYTE_OF[character] for character in piece)
        elif token not in added and len(piece) == 6 and piece.startswith("<0x"):  # SentencePiece: a single byte
            result[token] = bytes([int(piece[3:5], 16)])
        else:
            result[token] = (piece if token in added else piece.replace(SPACE, " ")).encode()
    return result


def token_texts(tokenizer, ids: Iterable[int]) -> list[str]:
    """Each token as text, with the space that SentencePiece writes in front of a word, and that decoding a token by
    itself takes away."""
    added, texts = tokenizer.added_tokens_decoder, []
    for token in ids:
        piece = tokenizer.convert_ids_to_tokens(token)
        is_word = piece is not None and token not in added and piece.startswith(SPACE)
        texts.append(piece.replace(SPACE, " ") if is_word else tokenizer.decode([token]))
    return texts


def token_text(token: int, spelling: bytes | None) -> str:
    """The token as text; spelling: its bytes. Incomplete UTF-8 is escaped, as in \\xf0\\x9f."""
    return f"<unused {token}>" if spelling is None else spelling.decode("utf-8", "backslashreplace")


def fingerprint(tokenizer) -> str:
    """The same 16 hexadecimal digits for tokenizers that have the same tokens under the same ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
