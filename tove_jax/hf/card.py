"""The model card of an exported student: what was trained on what, by which experts, with which numbers."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tove_jax.config.schema import METHOD_TITLES, Config, MergeConfig

RANDOM_START = "Random weights, drawn with seed {}."
"""The sentence by which the card of a start says that it is no trained tower."""


def drawn_with(folder: Path) -> int | None:
    """Returns the seed of a start that tove_jax drew, from the folder's card; None for any other folder."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    before, after = RANDOM_START.split("{}")
    found = re.search(f"{re.escape(before)}(\\d+){re.escape(after)}", text)
    return int(found[1]) if found else None


def model_card(config: Config, weights_hash: str, provenance: Mapping[str, Any], *, whole: bool = False) -> str:
    """Writes README.md of an export.

    Args:
      config: settings of the run.
      weights_hash: `tove_jax.files.weights.hash_arrays` of the published arrays; empty: not told.
      provenance: each of these may be missing:
        ``step``: optimiser steps taken;
        ``experts``: list of `tove_jax.experts.base.ExpertCard`, or of mappings with its fields, and
        optionally ``weights_hash``;
        ``data``: mapping with ``name``, ``licence``, ``train`` and ``held_out`` (numbers of pictures);
        ``metrics``: flat names to numbers, as in metrics.json.
      whole: the folder holds the language model too.

    Returns:
      Markdown with the hub's front matter.
    """
    student, method, optim, train = config.student, config.method, config.optim, config.train
    adapter = student.adapter
    has_experts = adapter.kind != "none"
    title = config.title or "Distilled CLIP vision tower"
    experts = [_fields(expert) for expert in provenance.get("experts") or ()]
    names = ", ".join(expert.get("title") or expert["name"] for expert in experts) or "no recorded experts"
    task = "image-text-to-text" if whole else "image-feature-extraction"
    front = ["library_name: transformers", f"pipeline_tag: {task}"]
    front += ["tags:", "- clip", "- vision", "- knowledge-distillation", "- tove_jax"]
    if _is_hub_id(student.initialize):
        front += [f"base_model: {json.dumps(student.initialize)}"]
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {title}",
        f"A {'vision-language model whose ' if whole else ''}CLIP vision tower {'was ' if whole else ''}distilled by "
        f"{_method(method)} from {names}, with tove_jax.",
        _whole_usage(config, has_experts) if whole else _usage(config, has_experts),
        "## Model",
        _table(
            ("", ""),
            [
                ("image, patch", f"{student.image_size} px, {student.patch_size} px"),
                (
                    "layers, width, heads, MLP",
                    f"{student.layers}, {student.width}, {student.heads}, {student.mlp_width}",
                ),
                ("LoRA experts", _adapter_line(config) if has_experts else "none: a plain `CLIPVisionModel`"),
                ("distilled feature", f"`{student.feature}`, patch tokens"),
                ("start", _start(config)),
                *([("language model", _language(config))] if whole else []),
                *([("weights hash", f"`{weights_hash}`")] if weights_hash else []),
            ],
        ),
        "## Experts",
        _experts(experts) if experts else "Not recorded.",
        "## Training",
        _table(("", ""), _training(config, provenance)),
        f"Settings: lr {optim.lr:g}, {optim.schedule}, batch {train.batch}, {train.dtype}, seed {train.seed}.",
        "## Numbers",
        _numbers(provenance.get("metrics") or {}),
        "## Check",
        "`tove verify FOLDER` loads this folder in JAX and, where torch is installed, in transformers, and compares.",
    ]
    return "\n\n".join(parts) + "\n"


def _method(method: Any) -> str:
    if method.name == "merge":
        return f"{_method(method.source_method)}, then merged into one tower,"
    return METHOD_TITLES[method.name]


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w\-][\w.\-]*/[\w.\-]+", name)) and not Path(name).exists()


def _start(config: Config) -> str:
    """Returns where the student began: a hub id as it is, what is known of random weights, or a folder's last name."""
    name, method = config.student.initialize, config.method
    if not name:
        return "random weights"
    folder = Path(name)
    drawn = drawn_with(folder)
    if drawn is not None:
        return f"random weights, drawn with seed {drawn}"
    # A run without a start of its own keeps the random one in its folder; a merge begins there.
    if isinstance(method, MergeConfig) and folder == Path(method.source) / "start":
        return "random weights, the start of the run that was merged"
    if _is_hub_id(name):
        return f"`{name}`"
    return f"`{folder.name}`"


def _fields(expert: Any) -> dict[str, Any]:
    return dict(expert) if isinstance(expert, Mapping) else dataclasses.asdict(expert)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").strip()


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _usage(config: Config, has_experts: bool) -> str:
    trust = ", trust_remote_code=True" if has_experts else ""
    index = config.student.feature.removeprefix("layers/")
    # transformers counts the embedding as hidden state 0, so only indices from the end agree with ours.
    index = index if index.startswith("-") else str(int(index) + 1 if index.isdigit() else -2)
    note = ""
    if config.student.view.fit in ("pad", "letterbox"):
        note = (
            f"\n\nThe student was trained on pictures brought to a square by `{config.student.view.fit}`, which the "
            "image processor does not do: pad them to a square first."
        )
    return (
        "```python\nfrom transformers import AutoImageProcessor, AutoModel\n\n"
        f"model = AutoModel.from_pretrained(folder{trust})\n"
        "processor = AutoImageProcessor.from_pretrained(folder)\n"
        'outputs = model(**processor(images=picture, return_tensors="pt"), output_hidden_states=True)\n'
        f"patch_tokens = outputs.hidden_states[{index}][:, 1:]\n```" + note
    )


def _whole_usage(config: Config, has_experts: bool) -> str:
    trust = ", trust_remote_code=True" if has_experts else ""
    return (
        "```python\nfrom transformers import AutoModelForImageTextToText, LlavaProcessor\n\n"
        f"model = AutoModelForImageTextToText.from_pretrained(folder{trust})\n"
        f"processor = LlavaProcessor.from_pretrained(folder{trust})\n"
        'content = [{"type": "image"}, {"type": "text", "text": "What is on the table?"}]\n'
        'prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)\n'
        'inputs = processor(images=[picture], text=[prompt], return_tensors="pt")\n'
        "print(processor.batch_decode(model.generate(**inputs, max_new_tokens=64), skip_special_tokens=True)[0])\n```"
    )


def _language(config: Config) -> str:
    language = config.language
    origin = f"from `{language.initialize}`" if _is_hub_id(language.initialize) else "trained from scratch"
    if language.initialize and not _is_hub_id(language.initialize):
        origin = "from a local folder"
    return f"{language.layers} layers, width {language.width}, projector `{language.projector}`, {origin}"


def _adapter_line(config: Config) -> str:
    adapter = config.student.adapter
    place = "beside both linears of each MLP" if adapter.site == "linears" else "beside each MLP"
    if adapter.kind == "mola":
        kind = "DoRA" if adapter.dora else "LoRA"
        return (
            f"{adapter.teacher_experts} teacher-specific and {adapter.general_experts} general of rank {adapter.rank} "
            f"({kind}), alpha {adapter.alpha:g}, top1 routing in each group, {place}"
        )
    return f"{adapter.experts} of rank {adapter.rank}, alpha {adapter.alpha:g}, {adapter.routing} routing, {place}"


def _experts(experts: list[dict[str, Any]]) -> str:
    rows = []
    for expert in experts:
        rows.append(
            (
                expert.get("title") or expert["name"],
                expert.get("weights") or "",
                expert.get("licence") or "not stated",
                expert.get("paper") or "",
                f"`{expert['weights_hash'][:16]}`" if expert.get("weights_hash") else "",
            )
        )
    table = _table(("expert", "weights", "licence", "paper", "weights hash"), rows)
    return table + "\n\nThe licences of the experts and of the pictures may bind what is distilled from them."


def _training(config: Config, provenance: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    data = provenance.get("data") or {}
    pictures = data.get("name") or config.data.source
    counts = [f"{data[key]} {word}" for key, word in (("train", "trained on"), ("held_out", "held out")) if key in data]
    trained = [pattern for pattern, factor in config.optim.groups if factor is not None]
    return [
        ("pictures", pictures + (f" ({', '.join(counts)})" if counts else "")),
        ("licence of the pictures", data.get("licence") or "not recorded"),
        ("method", _method(config.method)),
        ("steps", provenance.get("step", config.train.steps)),
        ("trained parameters", ", ".join(f"`{pattern}`" for pattern in trained)),
    ]


def _numbers(metrics: Mapping[str, Any]) -> str:
    """Returns a table; ``x_low`` and ``x_high`` become the interval of ``x``, and ``x_std`` is left out."""
    numbers = {
        name: value
        for name, value in sorted(metrics.items())
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    rows = []
    for name, value in numbers.items():
        stem = re.sub(r"_(low|high|std)$", "", name)
        if stem != name and stem in numbers:
            continue
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        if f"{name}_low" in numbers and f"{name}_high" in numbers:
            text += f" ({numbers[f'{name}_low']:.4g} to {numbers[f'{name}_high']:.4g})"
        rows.append((f"`{name}`", text))
    if not rows:
        return "None recorded."
    return _table(("metric", "value, with its 95 % interval where there is one"), rows)
