#!/usr/bin/env python3
"""Compares our tokens with those of the Python package `tokenizers`, token by token.

    check_tokenizers.py FILE...            each a tokenizer.json, or a GGUF file with its own vocabulary
    check_tokenizers.py --as PRE FILE...   each a tokenizer.json, made a GGUF file with this pre-tokenizer's name
    check_tokenizers.py --fixture          writes tokens.json, the small fixture of the tests

Needs tokenizers and gguf, and `cargo build --release -p sparsed-model --examples`. The text is the same on every run
with the same Python: sources of this repository and of Python, generated Chinese, every assigned character, emoji and
odd whitespace, long runs, broken UTF-8 as U+FFFD. Each record is compared as trusted text, and as plain text where it
holds no added token.
"""
import json
import pathlib
import random
import struct
import subprocess
import sys
import sysconfig
import tempfile
import unicodedata

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOL = ROOT / "target/release/examples/tokenize"
FIXTURE = pathlib.Path(__file__).with_name("tokens.json")
FILE_CHARS_MAX = 60_000
SOURCE_BYTES_MAX = 900_000

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK3 = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]
# Of the models' own tokenizer.json.
PRE = {"gpt-2": [GPT2], "smollm": [r"\p{N}", GPT2], "llama-bpe": [LLAMA3], "glm4": [LLAMA3], "deepseek-v3": DEEPSEEK3}
COMMON = "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
ODD = """😀 👩‍👩‍👧 🏳️‍🌈 👍🏽 🇫🇷 ❤️ ☃ 𝔘𝔫𝔦 ﷺ é e\u0301 ſ 'ſ 'S 'LL ǅ ½ ² Ⅷ ٣ ߂ 𝟙 ß İ ı Å ひらがな カタカナ 한국어 Русский العربية हिन्दी ไทย""".split(" ")
ODD += list("\u200b\u00a0\u3000\u2028\u0085\ufeff\x0b\x0c\x1c\x1f\r\t\ue000\ufffd\ud7ff\u1680\u180e") + ["\r\n", "\U000f0000", "\U0010ffff"]
WORDS = ["word", "Word", "I", "don't", "we'll", "x=", "foo_bar", "HTML", "naïve", "a", "tion"]
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "     "]


def odd_record(rng):
    parts = []
    for _ in range(rng.randint(1, 40)):
        kind = rng.random()
        if kind < 0.3:
            parts.append(rng.choice(ODD))
        elif kind < 0.5:
            parts.append(rng.choice(SPACES))
        elif kind < 0.7:
            parts.append(rng.choice(WORDS))
        elif kind < 0.8:
            parts.append(str(rng.randint(0, 10 ** rng.randint(1, 12))))
        elif kind < 0.9:
            parts.append(rng.choice("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") * rng.randint(1, 4))
        else:
            code = rng.randint(1, 0x10FFFF)
            parts.append(chr(code if not 0xD800 <= code <= 0xDFFF else 0x4E00))
    return "".join(parts)


def chinese_record(rng):
    parts = []
    while sum(map(len, parts)) < rng.randint(20, 400):
        parts.append("".join(rng.choices(COMMON, k=rng.randint(1, 12))) + rng.choice("，。！？、；：“”（）《》 \n"))
        if rng.random() < 0.1:
            parts.append(chr(rng.randint(0x4E00, 0x9FFE)) + str(rng.randint(0, 10 ** rng.randint(1, 9))))
    return "".join(parts)


def corpus():
    rng = random.Random(7)
    records, size = [], 0
    sources = [path for kind in ("*.rs", "*.md", "*.py") for path in ROOT.rglob(kind) if "target" not in path.parts]
    sources = sorted(sources) + sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for path in sources:
        text = path.read_text("utf-8", "replace")[:FILE_CHARS_MAX]
        records.append(text)
        size += len(text.encode())
        if size > SOURCE_BYTES_MAX:
            break
    records += [chinese_record(rng) for _ in range(300)]
    records += [odd_record(rng) for _ in range(2500)]
    records += [rng.randbytes(rng.randint(1, 80)).decode("utf-8", "replace") for _ in range(400)]
    records += [text * 3000 for text in (" ", "\n", "a", "1", "！", "ab ", "\r\n")]
    assigned = [c for c in map(chr, range(1, 0x30000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    for at in range(0, len(assigned), 500):
        records += ["".join(assigned[at : at + 500]), " ".join(assigned[at : at + 500 : 7])]
    return [record.replace("\0", " ") for record in records]


def ours(path, records):
    with tempfile.TemporaryDirectory() as folder:
        text, out = pathlib.Path(folder, "text"), pathlib.Path(folder, "out")
        text.write_bytes("".join(record + "\0" for record in records).encode())
        subprocess.run([TOOL, path, text, out], check=True, stdout=subprocess.DEVNULL)
        data = out.read_bytes()
    lists, at = [], 0
    while at < len(data):
        (count,) = struct.unpack_from("<I", data, at)
        lists.append(list(struct.unpack_from(f"<{count}I", data, at + 4)))
        at += 4 + 4 * count
    return lists[0::2], lists[1::2]


def compare(name, path, theirs, records):
    plain, trusted = ours(path, records)
    added = [token.content for token in theirs.get_added_tokens_decoder().values()]
    expect = [encoding.ids for encoding in theirs.encode_batch(records, add_special_tokens=False)]
    plain_records = unequal = 0
    for record, p, t, e in zip(records, plain, trusted, expect, strict=True):
        without = not any(token in record for token in added)
        plain_records += without
        if t != e or (without and p != e):
            unequal += 1
            print(f"  {record[:60]!r}: {t[:12]} is {e[:12]}")
    size = sum(len(record.encode()) for record in records)
    tokens = sum(map(len, expect))
    print(f"{name}: {size} bytes, {tokens} tokens, {len(records)} records ({plain_records} plain): {unequal} unequal")
    return unequal


def from_gguf(path):
    """The `tokenizers` of the parts in a GGUF file."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    strings = lambda key: [bytes(fields[key].parts[at]).decode() for at in fields[key].data]
    tokens = strings("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in strings("tokenizer.ggml.merges")]
    kinds = [int(fields["tokenizer.ggml.token_type"].parts[at][0]) for at in fields["tokenizer.ggml.token_type"].data]
    theirs = plain_tokenizer({token: at for at, token in enumerate(tokens)}, merges, strings("tokenizer.ggml.pre")[0])
    special = [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, kinds) if kind in (3, 4)]
    theirs.add_special_tokens(special)
    return theirs


def plain_tokenizer(vocab, merges, pre):
    from tokenizers import Regex

    theirs = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in ("llama-bpe", "glm4")))
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE[pre]]
    theirs.pre_tokenizer = pre_tokenizers.Sequence(steps + [pre_tokenizers.ByteLevel(False, use_regex=False)])
    return theirs


def to_gguf(path, pre, out):
    """A vocabulary as a GGUF file, as llama.cpp's converter types its tokens."""
    import gguf

    file = json.loads(pathlib.Path(path).read_text())
    added = {token["id"]: token for token in file["added_tokens"]}
    names = {at: token for token, at in file["model"]["vocab"].items()} | {at: t["content"] for at, t in added.items()}
    special = lambda t: t["special"] or (t["content"][:2], t["content"][-2:]) in (("<|", "|>"), ("<｜", "｜>"))
    count = max(names) + 1
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([names.get(at, f"[PAD{at}]") for at in range(count)])
    writer.add_token_types([(3 if special(added[at]) else 4) if at in added else (1 if at in names else 5) for at in range(count)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in file["model"]["merges"]])
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_fixture():
    """A vocabulary of 600 tokens trained on this text, and the tokens of short records with each pre-tokenizer."""
    rng = random.Random(11)
    records = [odd_record(rng)[:120] for _ in range(45)] + [chinese_record(rng)[:60] for _ in range(8)]
    records += [" " * 40 + "x", "a" * 70, "\n" * 30 + " y", "I'LL don't 12345 世界！ foo_bar\n\n  x = 3.14159;"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(records, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    encoded = {}
    for pre in PRE:
        theirs = plain_tokenizer(vocab, merges, pre)
        encoded[pre] = [encoding.ids for encoding in theirs.encode_batch(records)]
    names = sorted(vocab, key=vocab.get)
    lines = json.dumps({"tokens": names, "merges": [" ".join(m) for m in merges], "records": records, "encoded": encoded}, ensure_ascii=False, separators=(",", ":"))
    FIXTURE.write_text(lines + "\n", "utf-8")


def main():
    arguments = sys.argv[1:]
    if arguments == ["--fixture"]:
        return write_fixture()
    pre = None
    if arguments[:1] == ["--as"]:
        pre, arguments = arguments[1], arguments[2:]
    records, unequal = corpus(), 0
    for path in arguments:
        name = "/".join(pathlib.Path(path).parts[-2:])
        if path.endswith(".gguf"):
            unequal += compare(name, path, from_gguf(path), records)
        elif pre is None:
            unequal += compare(name, path, Tokenizer.from_file(path), records)
        else:
            with tempfile.TemporaryDirectory() as folder:
                made = str(pathlib.Path(folder, "vocabulary.gguf"))
                to_gguf(path, pre, made)
                unequal += compare(f"{name} as {pre}", made, Tokenizer.from_file(path), records)
    sys.exit(unequal > 0)


if __name__ == "__main__":
    main()
