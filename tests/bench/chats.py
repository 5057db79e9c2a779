#!/usr/bin/env python3
"""Which long chats does a file of ShareGPT have? Writes some of them, evenly spaced, as `selections.rs` reads them.

Usage: chats.py SHAREGPT.json CHATS.jsonl COUNT CHARACTERS

The pieces into which the data set has cut a long conversation are joined again; a piece may begin with the answer that
the one before has ended with. Taken are conversations of so many characters, 95 % of them ASCII, with four messages or
more, of which a person has the first. The file may end anywhere: what was begun last is left out.
"""
import json
import sys

ROLES = {"human": "user", "user": "user", "system": "system"}


def objects(text):
    """The objects of a JSON array that may be cut off."""
    decoder, at = json.JSONDecoder(), text.index("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return
        yield value
        at = text.find("{", end)


def joined(pieces):
    """The turns of a conversation, or none where a piece is missing."""
    turns = []
    for start, piece in sorted(pieces, key=lambda piece: piece[0]):
        repeated = len(turns) - start
        if repeated not in (0, 1) or piece[:repeated] != turns[start:]:
            return []
        turns += piece[repeated:]
    return turns


path, out, count, n_characters = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
conversations = {}
with open(path, encoding="utf-8") as file:
    for piece in objects(file.read()):
        name, start = piece["id"].rsplit("_", 1)
        conversations.setdefault(name, []).append((int(start), piece["conversations"]))
found = []
for name, turns in ((name, joined(pieces)) for name, pieces in conversations.items()):
    text = "".join(turn["value"] for turn in turns)
    is_long = len(turns) >= 4 and len(text) >= n_characters
    if is_long and turns[0]["from"] == "human" and sum(map(str.isascii, text)) >= 0.95 * len(text):
        found.append((name, turns))
picked = [found[at * len(found) // count] for at in range(count)]
with open(out, "w", encoding="utf-8") as file:
    for _, turns in picked:
        messages = [{"role": ROLES.get(turn["from"], "assistant"), "content": turn["value"]} for turn in turns]
        print(json.dumps(messages), file=file)
print(f"{len(found)} conversations, taken: {' '.join(name for name, _ in picked)}")
