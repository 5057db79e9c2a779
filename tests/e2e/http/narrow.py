"""Writes what schemathesis tries of a description: narrow.py WHOLE.yaml PATCH.yaml OUT.json. A path that is another name of
one, and one that says that it is not served, which by its status is a server error, are left out."""

import json
import sys

import yaml


def merged(whole, patch):
    """A member of `patch` in the place of one of `whole`, as RFC 7396 has it."""
    if not isinstance(patch, dict):
        return patch
    whole = dict(whole) if isinstance(whole, dict) else {}
    for name, member in patch.items():
        if member is None:
            whole.pop(name, None)
        else:
            whole[name] = merged(whole.get(name), member)
    return whole


def is_tried(item):
    """Whether requests are made of a path."""
    operations = [operation for operation in item.values() if isinstance(operation, dict)]
    return "$ref" not in item and not any("501" in operation.get("responses", {}) for operation in operations)


whole, patch, out = sys.argv[1:]
with open(whole, encoding="utf-8") as whole, open(patch, encoding="utf-8") as patch:
    described = merged(yaml.safe_load(whole), yaml.safe_load(patch))
described["paths"] = {path: item for path, item in described["paths"].items() if is_tried(item)}
with open(out, "w", encoding="utf-8") as out:
    json.dump(described, out)
