"""Our models inside lmms-eval: ``python -m tove_jax.eval.lmms --model tove_jax --model_args pretrained=FOLDER ...``.

lmms-eval (MIT) is not among our requirements and is imported inside functions alone. Folders that `transformers` opens as
`LlavaForConditionalGeneration` need none of this: its own model `llava_hf` takes them. Written against version 0.7.3.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tove_jax.errors import InputError
from tove_jax.language.answer import Answerer
from tove_jax.language.decode import Decoding

NAME = "tove_jax"
_NEW_TOKENS = 1024
_CONTINUED = 64


def decoding_of(settings: dict[str, Any]) -> Decoding:
    """Returns lmms-eval's ``generation_kwargs`` as ours: greedy unless a temperature above 0 is given."""
    temperature = float(settings.get("temperature") or 0.0)
    top_p = settings.get("top_p")
    return Decoding(
        new_tokens=int(settings.get("max_new_tokens") or _NEW_TOKENS),
        sample=temperature > 0,
        temperature=temperature or 1.0,
        top_p=1.0 if top_p is None or not temperature else float(top_p),
        beams=1 if temperature else int(settings.get("num_beams") or 1),
    )


def pictures_of(visuals: Any, task: str) -> list[np.ndarray]:
    """Returns a document's pictures, PIL's, as uint8 (H, W, 3); raises InputError for videos and sounds."""
    if visuals is None:
        return []
    found = []
    for visual in visuals if isinstance(visuals, list | tuple) else [visuals]:
        if not hasattr(visual, "convert"):
            raise InputError(f"lmms-eval: task {task}: expected pictures, found {type(visual).__name__}")
        found.append(np.asarray(visual.convert("RGB")))
    return found


def cut_at(text: str, until: Any) -> str:
    """Returns what stands before the first of some texts."""
    for end in [until] if isinstance(until, str) else until or ():
        text = text.split(end)[0] if end else text
    return text


class Bridge:
    """Answers lmms-eval's requests with an `Answerer`.

    Args:
      answerer: the model.
      batch: prompts, or choices, at once.
      documents: ``(task, split, number) -> document``.
    """

    def __init__(self, answerer: Answerer, batch: int, documents: Callable[[str, str, Any], Any]):
        self._answerer, self._batch, self._documents = answerer, batch, documents

    def _pictures(self, doc_to_visual: Callable[[Any], Any], task: str, split: str, number: Any) -> list[np.ndarray]:
        return pictures_of(doc_to_visual(self._documents(task, split, number)), task)

    def generate(self, requests: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Yields prompt, settings and answer of each request, in order; those in a row with the same settings go together."""
        asked = [request.args for request in requests]
        for _, group in itertools.groupby(asked, lambda arguments: repr(sorted(arguments[1].items()))):
            rows = list(group)
            for start in range(0, len(rows), self._batch):
                part = rows[start : start + self._batch]
                shown = [self._pictures(visual, task, split, number) for _, _, visual, number, task, split in part]
                settings = part[0][1]
                texts = self._answerer.answer(shown, [row[0] for row in part], decoding_of(settings))
                for row, text in zip(part, texts, strict=True):
                    yield row[0], settings, cut_at(text, settings.get("until")).strip()

    def losses(self, requests: Sequence[Any]) -> Iterator[tuple[float, bool]]:
        """Yields for each request the mean loss a token of its continuation, and whether greedy decoding writes it.

        lmms-eval takes the least as the answer. Requests in a row about one prompt are ranked together; whether a
        continuation is the greedy one is only found out where there is no other, as nothing asks for it elsewhere.
        """
        asked = [request.args for request in requests]
        for _, group in itertools.groupby(asked, lambda arguments: (arguments[0], *map(str, arguments[3:]))):
            rows = list(group)
            context, _, visual, number, task, split = rows[0]
            shown, document = self._pictures(visual, task, split, number), self._documents(task, split, number)
            texts = [str(row[1](document) if callable(row[1]) else row[1]).strip() for row in rows]
            greedy = ""
            if len(texts) == 1:
                greedy = self._answerer.answer([shown], [context], Decoding(new_tokens=_CONTINUED))[0]
            for start in range(0, len(texts), self._batch):
                part = texts[start : start + self._batch]
                for text, score in zip(
                    part, self._answerer.rank([shown], [context], [part], mean=True)[0], strict=True
                ):
                    yield -float(score), len(texts) == 1 and text == greedy


def make_class() -> type:
    """Makes the class that lmms-eval opens; raises ImportError where lmms-eval is not installed."""
    from lmms_eval.api.model import lmms

    class Tove(lmms):
        """One of our models; ``--model_args pretrained=FOLDER,step=N,experts=a+b,template=v1``."""

        is_simple = True

        def __init__(
            self,
            pretrained: str,
            batch_size: int | str = 1,
            step: int | None = None,
            experts: str | None = None,
            template: str = "",
            **unused: Any,
        ):
            super().__init__()
            from tove_jax.eval.answerers import open_answerer

            unknown = set(unused) - {"device", "max_batch_size"}
            if unknown:
                raise InputError(f"model_args: expected pretrained, step, experts, template, found {min(unknown)}")
            attached = None if experts is None else tuple(name for name in str(experts).split("+") if name)
            answerer = open_answerer(
                pretrained, step=None if step is None else int(step), experts=attached, template=template
            )
            self.bridge = Bridge(answerer, int(batch_size), lambda task, split, doc: self.task_dict[task][split][doc])

        def generate_until(self, requests: list[Any]) -> list[str]:
            found = []
            for context, settings, text in self.bridge.generate(requests):
                self.cache_hook.add_partial("generate_until", (context, settings), text)
                found.append(text)
            return found

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return list(self.bridge.losses(requests))

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise InputError("lmms-eval: tasks of several rounds are not answered")

    return Tove


def __getattr__(name: str) -> Any:
    # lmms-eval imports this module and asks for the class by name.
    if name == "Tove":
        found = make_class()
        globals()["Tove"] = found
        return found
    raise AttributeError(name)


def manifest() -> Any:
    """Returns the entry that tells lmms-eval where the class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path="tove_jax.eval.lmms.Tove")


def main() -> None:
    """Registers our models, then runs lmms-eval's own command line."""
    try:
        from lmms_eval import models
        from lmms_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"lmms-eval cannot be imported ({error}): pip install lmms-eval")
    models.MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    cli_evaluate()


if __name__ == "__main__":
    main()
