"""The vocabulary of the golden label masks: run as a module with the folder of tokenizer.model to write it again.

`llava_labels.json` holds conversations with the ids and labels of LLaVA's published preprocessing, by the tokenizer
`tokenizer.model.v1` of the package mistral-common (Apache-2.0). `llava_labels_tokenizer.json` is that tokenizer with
only the pieces that the conversations can need, under their own ids: every merge gives a part of the text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tove_jax.data.conversation import TEMPLATES
from tove_jax.data.tokenizer import load_tokenizer

HERE = Path(__file__).parent
LABELS = HERE / "llava_labels.json"
VOCABULARY = HERE / "llava_labels_tokenizer.json"


def reduce_vocabulary(folder: Path | str) -> dict:
    """Returns the tokenizer of a folder, as the JSON of its file, without the pieces that no golden case has."""
    content = json.loads(load_tokenizer(folder).inner.backend_tokenizer.to_str())
    cases = json.loads(LABELS.read_text("utf-8"))["cases"]
    texts = [turn["value"] for case in cases for turn in case["conversation"]]
    texts += [part for row in TEMPLATES.values() for part in (row.system, row.opening, row.question, row.reply)]
    text = "▁" + "▁".join(texts + ["▁" * 8]).replace(" ", "▁")
    vocabulary = {
        piece: id
        for piece, id in content["model"]["vocab"].items()
        if id < 259 or len(piece) == 1 and ord(piece) < 128 or piece in text
    }
    content["model"]["vocab"] = vocabulary
    content["model"]["merges"] = [
        pair for pair in content["model"]["merges"] if {*pair, "".join(pair)} <= vocabulary.keys()
    ]
    return content


if __name__ == "__main__":
    VOCABULARY.write_text(json.dumps(reduce_vocabulary(sys.argv[1]), ensure_ascii=False) + "\n", "utf-8")
