"""What the programs have in common that work on an image's tree: `tree_look` and `tree_fill`.

Children of the host's worker (`limited_child`), so that what a tenant's tree makes one do ends with
it. Each piece of work takes one JSON document on standard input and gives one on standard output:
the answer, or `{"refused": {…}}` with what is wrong with the tree. They begin in every build, which
takes as long as what they import: only some of the standard library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping

from activities.disk.tenant_tree import RefusedTreeError

Work = Mapping[str, Callable[..., Mapping[str, object]]]


def run(work: Work) -> None:
    """Do the piece of work that the command line names; what is wrong with a tree is an answer."""
    sys.stdout.write(json.dumps(_answer(work[sys.argv[1]])))


def _answer(do: Callable[..., Mapping[str, object]]) -> Mapping[str, object]:
    try:
        return do(json.load(sys.stdin))
    except RefusedTreeError as error:
        return {"refused": {"why": str(error), "limit": error.limit}}
    except MemoryError:
        return {"refused": {"why": "looking at it takes more memory", "limit": "memory"}}
