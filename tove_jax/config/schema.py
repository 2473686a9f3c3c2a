"""Every setting of a run, as frozen dataclasses: the one place where a field, its type, its
default and its reason are written. The config reference in the docs is generated from here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from tove_jax.config.specs import expert_name


def option(default: Any, doc: str) -> Any:
    """Returns a dataclass field with a default and the sentence that documents it."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def section(kind: type, doc: str) -> Any:
    """Returns a dataclass field that holds another section with its own defaults."""
    return dataclasses.field(default_factory=kind, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class ViewConfig:
    """The student's view of a picture; experts bring their own."""

    fit: Literal["crop", "letterbox", "pad", "squash"] = option("crop", "How a picture is brought to a square.")
    interpolation: Literal["bilinear", "bicubic"] = option("bicubic", "Resampling filter.")
    mean: tuple[float, ...] = option((0.48145466, 0.4578275, 0.40821073), "Mean per channel; CLIP's.")
    std: tuple[float, ...] = option((0.26862954, 0.26130258, 0.27577711), "Deviation per channel; CLIP's.")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """LoRA experts in every MLP of the student: MoVE-KD's MoLE or HAWAII's MoLA. Defaults are MoVE-KD's."""

    kind: Literal["none", "mole", "mola"] = option(
        "mole", "`none` leaves a plain CLIP tower; `mole`: one group and router; `mola`: teachers' and general experts."
    )
    experts: int = option(3, "Number of LoRA experts E of `mole`. [code]")
    teacher_experts: int = option(
        0, "Teacher-specific experts N_t of `mola`; 0: one for each expert of the run. [paper]"
    )
    general_experts: int = option(3, "General experts N_g of `mola`; 0 leaves them and their router out. [paper]")
    router_width: int = option(256, "Hidden width of `mola`'s two routers. Ours.")
    dora: bool = option(
        False, "`mola`: DoRA in place of LoRA, every expert with magnitudes of its own; site `linears`."
    )
    rank: int = option(32, "Rank of each expert. [code]")
    alpha: float = option(1.0, "LoRA scale is alpha / rank. [code]")
    dropout: float = option(0.05, "Dropout before A while training. [code]")
    routing: Literal["top1", "dense"] = option("top1", "One expert a token, or all, weighted by the router. [code]")
    site: Literal["linears", "ffn"] = option("linears", "Beside both linears of the MLP, or once beside the whole MLP.")
    b_init: Literal["kaiming", "zeros"] = option("kaiming", "`zeros`: step 0 equals CLIP exactly. [code: kaiming]")
    router_gradient: Literal["none", "straight_through"] = option(
        "none", "`none`: only the balance loss trains the router, as released. [code]"
    )


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The CLIP vision tower that learns."""

    initialize: str = option(
        "", "CLIP folder or hub id to start from; empty: random. Its shape must match the fields below."
    )
    image_size: int = option(336, "Pixels; position embeddings are resized when the start has another size.")
    patch_size: int = option(14, "Pixels a side of a patch.")
    width: int = option(1024, "Token width.")
    layers: int = option(24, "Transformer blocks.")
    heads: int = option(16, "Attention heads.")
    mlp_width: int = option(4096, "Hidden width of the MLP.")
    activation: Literal["quick_gelu", "gelu"] = option("quick_gelu", "OpenAI's CLIP uses quick_gelu, OpenCLIP gelu.")
    norm_epsilon: float = option(1e-5, "Layer norm epsilon.")
    feature: str = option("layers/-2", "The intermediate whose patch tokens are distilled and used. [code]")
    attention: Literal["auto", "xla", "cudnn", "pallas"] = option("auto", "Attention implementation.")
    remat: Literal["none", "dots", "full"] = option("none", "What the backward pass computes again, a block at a time.")
    view: ViewConfig = section(ViewConfig, "How the student sees a picture.")
    adapter: AdapterConfig = section(AdapterConfig, "LoRA experts in the MLPs.")


@dataclasses.dataclass(frozen=True)
class MoveKDConfig:
    """MoVE-KD's objective: every choice of the paper and of the released code."""

    name: Literal["move_kd"] = option("move_kd", "Selects this method.")
    clip_expert: str = option("clip", "Name of the expert whose tokens need no encoder adapter. [code]")
    token_weighting: bool = option(True, "Add the attention-weighted term. [code]")
    token_weight_source: Literal["probs_softmax", "probs", "scores"] = option(
        "probs_softmax",
        "Softmax over CLS attention probabilities (code), the probabilities, or softmax of the scores (paper).",
    )
    teacher_weighting: bool = option(True, "Weight teachers by their agreement with CLIP's CLS; else uniform. [code]")
    teacher_prior: tuple[float, ...] = option(
        (),
        "Weights of the teachers but CLIP when teacher_weighting is off, in the experts' order; empty: uniform. Ours.",
    )
    teacher_score_scale: Literal["one", "inverse_sqrt_width"] = option("one", "Scale of that agreement. [code: one]")
    saturation_rule: bool = option(
        True, "A second softmax when one teacher's mean weight exceeds the threshold. [code]"
    )
    saturation_threshold: float = option(0.8, "That threshold. [code]")
    saturation_scope: Literal["device", "global"] = option(
        "global", "Mean over each device's rows (code) or over the global batch (the same on one device)."
    )
    clip_weight: float = option(0.8, "Weight pinned to CLIP; the rest is shared by the other teachers. [code]")
    stop_gradient_teacher_weight: bool = option(False, "Detach the teacher weights. [code: off]")
    target: Literal["adapter", "interpolate"] = option(
        "adapter", "Encoder adapter, or a channel Linear after interpolating the grid (the paper's naive ablation)."
    )
    kd_weight: float = option(0.5, "Weight of the distillation loss. [code]")
    balance_weight: float = option(0.01, "Weight of the balance loss. [code]")
    balance_pool: Literal["all", "layer"] = option(
        "all", "Pool the balance loss over all layers, or a layer at a time. [code: all]"
    )
    kd_on_text_only: bool = option(True, "Distil on rows without a picture too. [code: on]")
    sam_expert: str = option("sam_l", "Name of the expert that `sam_layout` is about.")
    sam_layout: Literal["spatial", "scrambled"] = option(
        "spatial",
        "SAM's tokens as they lie in the picture, or as the released wrapper flattens them. [code: scrambled]",
    )


@dataclasses.dataclass(frozen=True)
class HawaiiConfig:
    """HAWAII's objective. No code is public: what the paper does not print is ours."""

    name: Literal["hawaii"] = option("hawaii", "Selects this method.")
    coarse: bool = option(True, "The coarse-grained term; off is the paper's ablation. [paper]")
    token_scoring: bool = option(True, "Score tokens in the fine-grained term; off: uniform, the ablation. [paper]")
    stop_gradient_token_score: bool = option(
        False, "Detach the token scores; then nothing trains the text head. Ours: off."
    )
    clip_expert: str = option("clip", "Name of the expert that `clip_target` is about. Ours.")
    clip_target: Literal["mlp", "raw"] = option(
        "mlp",
        "CLIP's fine-grained target: through its head, or its tokens as they are, an anchor against collapse. Ours.",
    )
    unshuffle: Literal["space_to_depth", "resize"] = option(
        "space_to_depth",
        "Bring a teacher's grid to a multiple k of the student's and move k x k cells into channels, or only resize. Ours.",
    )
    head_width: int = option(0, "Hidden width of the heads; 0: the student's width. Ours.")
    instruction_width: int = option(
        0, "Width of the instruction's token embeddings; 0: no text head, teacher rows alone."
    )
    instruction_tokens: int = option(512, "Instruction tokens that are read at most. Ours.")
    kd_weight: float = option(0.5, "lambda_1, weight of the sum of both distillation terms. [paper]")
    balance_weight: float = option(0.05, "lambda_2, weight of the balance loss. [paper]")
    balance_pool: Literal["batch", "row"] = option(
        "batch", "Take the load over the tokens of the whole batch, or of a row at a time. Ours."
    )
    kd_on_text_only: bool = option(False, "Distil and balance on rows without a picture too. Ours: off.")


@dataclasses.dataclass(frozen=True)
class ToVEConfig:
    """ToVE's transfer phase. Its paper prints the residual and the gate; every size, start and option is ours."""

    name: Literal["tove"] = option("tove", "Selects this method.")
    attach_all: bool = option(True, "Attach every expert of `features.experts`; off: those of `attached` alone.")
    attached: tuple[str, ...] = option(
        (), "Names of the attached experts, read when `attach_all` is off; a detached expert is neither read nor run."
    )
    map_experts: tuple[str, ...] = option(
        (), "Names of the experts whose patches are a dense map of 1 to 3 channels; each gets a conv stem. Ours."
    )
    stem_width: int = option(768, "Width w of a stem: its convolutions have w/8, w/4, w/2 and w channels. Ours.")
    stem_groups: int = option(8, "Groups of a stem's group norms; divides w/8. Ours.")
    hidden: int = option(768, "Hidden width of the projector. Ours.")
    norm: Literal["none", "layer"] = option("none", "Norm of each expert's tokens before its first layer. Ours.")
    zero_init: bool = option(False, "The projector's second layer starts at zero: step 0 equals CLIP. Ours.")
    scale: float = option(1.0, "Factor on the routed knowledge before it is added. Ours.")
    gate_init: Literal["zeros", "linear"] = option(
        "zeros", "The gate starts uniform, or as torch.nn.Linear draws. Ours."
    )
    noise: bool = option(False, "Train with noise N(0, 1/K^2) on the gate's logits, and a load term in the loss. Ours.")
    expert_drop: float = option(
        0.0, "Chance that an expert is left out of a picture while training; one always stays. Ours."
    )
    text_weight: float = option(1.0, "Weight of the text loss; 0: no caption head, and captions are not read.")
    aux_weight: float = option(0.01, "Weight of the load-balance loss. Ours.")
    vocabulary: int = option(1024, "Words the caption head tells apart, the training captions' commonest. Ours.")
    vocabulary_count: int = option(2, "Times a word must occur in the training captions to be one of them. Ours.")
    caption_words: int = option(16, "Words of a caption that are read at most. Ours.")


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Distilling the tokens of a finished run into one plain CLIP tower; `tove merge` fills in the first four fields after the name."""

    name: Literal["merge"] = option("merge", "Selects this method.")
    source: str = option("", "Folder of the finished run whose tokens are distilled.")
    source_step: int = option(0, "A saved step of that run; 0: its last one, and the run must be finished.")
    source_method: MoveKDConfig | HawaiiConfig | ToVEConfig = section(MoveKDConfig, "The `method` of that run.")
    source_adapter: AdapterConfig = section(AdapterConfig, "The `student.adapter` of that run.")
    loss: Literal["mse", "cosine", "cosine_smooth_l1"] = option(
        "mse", "Distance of the tokens: squared error [paper], cosine, or 0.9 cosine and 0.1 smooth L1 (ours)."
    )
    begin: Literal["tower", "start"] = option(
        "tower", "Train a copy of the run's tower without its adapters, or of the start of that run. Ours."
    )
    blocks: int = option(
        0, "Train the last n blocks up to `student.feature`; 0: all of them, and the embeddings. Ours."
    )
    lora_rank: int = option(
        0,
        "Train low-rank updates of the blocks' kernels in place of the blocks; they end up in the kernels. 0: off. Ours.",
    )
    text_weight: float = option(
        0.0, "Weight of the text loss on the merged tokens, by the run's own caption head, frozen; only ToVE has one."
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where pictures come from and how they are split."""

    source: Literal[
        "openmoji",
        "openmoji_questions",
        "photographs",
        "folder",
        "webdataset",
        "llava",
        "coco",
        "vqav2",
        "gqa",
        "textvqa",
        "vizwiz",
        "pope",
        "vsr",
        "scienceqa",
    ] = option("openmoji", "Kind of source, see `tove_jax.data.make_source`.")
    path: str = option(
        "", "Folder, JSON file, some parts of one (`file#part+part`) or tar pattern, as the source wants it."
    )
    images: str = option("", "Folder of the pictures that a JSON file names; empty: the file's own folder.")
    annotations: str = option("", "File of the answers where they are apart: VQAv2's, or ScienceQA's splits.")
    image_size: int = option(224, "Side at which drawings are rendered, pixels.")
    cache: str = option("", "Folder for rendered pictures; empty: a `tove_jax` folder in the user's cache.")
    held_out: float = option(0.25, "Share of pictures held out, by a hash of their id.")
    split_salt: str = option("", "Changes the split.")
    limit: int = option(0, "Use only this many pictures, spread over the source; 0: all.")
    flip: bool = option(False, "Also train on mirrored pictures; experts' features are extracted for both.")
    threads: int = option(2, "Threads that read and decode.")
    prefetch: int = option(16, "Batches kept ready.")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Conversations about the pictures, as rows of tokens."""

    tokenizer: str = option("", "Folder or hub id of the tokenizer; empty: that of `language.initialize`.")
    template: str = option("v1", "How turns are joined, see `tove_jax.data.conversation.TEMPLATES`. [code]")
    limit: int = option(2048, "Tokens a conversation keeps, those of its pictures among them. [code]")
    buckets: tuple[int, ...] = option(
        (), "Lengths that batches are padded to, one compilation each; empty: 3/8, 1/2 and 3/4 of the limit, and it."
    )
    window: int = option(1, "Batches that are sorted by length together; 1 is LLaVA's, more gives less padding. [code]")
    by_modality: bool = option(True, "Keep conversations with and without pictures in batches of their own. [code]")
    pack: bool = option(False, "Put several conversations into one row of `limit` tokens; none sees another. Ours.")
    pictures: int = option(1, "Pictures of a row at most.")


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """The language model that reads the student's tokens; its text loss is added to the method's."""

    kind: Literal["none", "llava", "tove"] = option(
        "none",
        "`none`: the method's terms alone; `llava`: a projector and a decoder of the Llama family; `tove`: RoBERTa made "
        "causal, with cross-attention and bottleneck adaptors.",
    )
    initialize: str = option("", "Folder or hub id of the language model; empty: random, of the shape below.")
    projector: Literal["mlp2x_gelu", "linear"] = option("mlp2x_gelu", "From student to language model. [code]")
    vocabulary: int = option(0, "Tokens the model tells apart; 0: those of the tokenizer.")
    width: int = option(4096, "Token width; this and the next four must match `initialize`.")
    layers: int = option(32, "Layers.")
    heads: int = option(32, "Attention heads.")
    kv_heads: int = option(32, "Key and value heads of `llava`.")
    mlp_width: int = option(11008, "Hidden width of the MLP.")
    adaptor_width: int = option(384, "Hidden width of `tove`'s bottleneck adaptors. Ours.")
    text_weight: float = option(1.0, "Weight of the text loss.")
    label_smoothing: float = option(0.0, "Share of each target spread over the vocabulary; ToVE's recipe has 0.1.")
    lora_rank: int = option(0, "Rank of low-rank updates beside `llava`'s linears, which then stay frozen; 0: none.")
    lora_alpha: float = option(16.0, "Their scale is alpha / rank.")
    loss_chunk: int = option(0, "Positions whose logits are held at once, over a row; 0: all of them.")
    attention: Literal["auto", "xla", "cudnn", "pallas"] = option("auto", "Attention implementation.")
    remat: Literal["none", "dots", "full"] = option("none", "What the backward pass computes again, a layer at a time.")


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """The experts and their feature store."""

    experts: tuple[str, ...] = option(
        ("clip", "efficientnet_lite0", "hed", "pp_ocr_det"),
        "Experts: a registered name, `name:size` for another input size, or `[name=]kind:source[:size]` with kind "
        "`torch`, `onnx` or `python`.",
    )
    path: str = option("", "Folder of the store; empty: `features` in the run's folder.")
    online: tuple[str, ...] = option(
        (),
        "Names of experts that run frozen inside the training step, in `train.dtype` where their loader offers it, "
        "and are not read from a store; `('all',)`: all of them.",
    )
    codec: str = option(
        "bf16",
        "How patch tokens are stored: `float32`, `bf16`, `fp8`, `int8` or `int4`, before it `pool:n` and `pca:k` as in "
        "`pool:24+pca:256+int8`; for single experts `int8,clip=bf16`.",
    )
    medium: Literal["mmap", "arrayrecord"] = option(
        "mmap", "Files of the store: mapped into memory, for local disks, or ArrayRecord, for mounted object stores."
    )
    views: Literal["published", "student"] = option(
        "published",
        "Each expert cuts a picture as published, or all of them as the student does (`student.view.fit`), so that "
        "their tokens lie over each other; size, filter and normalisation stay their own. [code: published]",
    )
    standardize: Literal["none", "centred", "phi_s"] = option(
        "none",
        "`centred` takes each channel's mean off every expert but CLIP and divides all channels by one deviation, so "
        "that geometry stays; ours. `phi_s` also rotates so that all channels have variance one (PHI-S, arXiv "
        "2410.01680). [code: none]",
    )
    shard_records: int = option(256, "Records a shard.")
    batch: int = option(
        0,
        "Pictures a step of extraction; 0: as many as the devices' memory takes, 16 on CPUs. Halved when short of it.",
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "In which experts compute while they are extracted, where their loader offers it."
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts, without what else their specs carry, see `tove_jax.config.specs`."""
        return tuple(expert_name(spec) for spec in self.experts)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule. Defaults: LLaVA-1.5's stage 1. [code]"""

    lr: float = option(1e-3, "Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "Decay after the warm-up, to zero.")
    warmup: float = option(0.03, "Share of the steps that warm up.")
    weight_decay: float = option(0.0, "Decoupled decay, on matrices only.")
    b1: float = option(0.9, "AdamW.")
    b2: float = option(0.999, "AdamW.")
    eps: float = option(1e-8, "AdamW.")
    clip_norm: float = option(1.0, "Clip the norm of the trainable gradient; 0: never.")
    groups: tuple[tuple[str, Any], ...] = option(
        (
            (".*/adapter/.*", 1.0),
            ("method/.*", 1.0),
            ("student/.*", None),
            ("language/(projector|lora)/.*", 1.0),
            # What ToVE adds to RoBERTa, and its head but for the tied embedding; `head/kernel` is Llama's.
            ("language/model/(.*/)?(cross|cross_norm|adaptor|adaptor_norm)/.*|language/model/head/(?!kernel).*", 1.0),
            ("language/.*", None),
        ),
        "First-match (regex, learning-rate factor or None for frozen); must cover every parameter.",
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    start_from: str = option(
        "",
        "Folder of a finished run, or of an export with adapters, whose parameters this run begins with; the frozen "
        "CLIP stays `student.initialize`. Empty: none.",
    )
    steps: int = option(1000, "Optimiser steps.")
    batch: int = option(256, "Global batch, pictures.")
    accumulation: int = option(1, "Micro-batches a step; divides the batch.")
    seed: int = option(42, "Seeds parameters, data order and dropout. [code]")
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "Compute dtype; masters are float32.")
    log_every: int = option(10, "Steps between written metrics.")
    checkpoint_every: int = option(500, "Steps between checkpoints.")
    keep: int = option(2, "Checkpoints kept.")
    replicated_limit_mb: float = option(
        64.0, "Start-up fails when an array larger than this is replicated though the mesh could shard it."
    )


METHOD_TITLES = {"move_kd": "MoVE-KD", "hawaii": "HAWAII", "tove": "ToVE", "merge": "merging"}
"""What people read for a method's name."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Shape of the device mesh; -1 is found from the devices and the batch."""

    data: int = option(-1, "Replicas of the parameters; -1: what is left.")
    fsdp: int = option(
        1, "Shards of parameters and optimiser state; batch is split over it too. -1: what is left, or `fsdp_limit`."
    )
    tensor: int = option(
        1, "Shards of heads and hidden widths. -1: what is left, or as few as let the batch divide over the rest."
    )
    fsdp_limit: int = option(16, "Where data and fsdp are both -1: shards at most, inside a slice or a node.")
    overlap: bool = option(True, "On several TPUs or GPUs, ask their compiler to send and gather beside other work.")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation of features on held-out pictures."""

    batch: int = option(64, "Pictures a step.")
    neighbours: int = option(5, "k of k-nearest-neighbour accuracy.")
    resamples: int = option(200, "Bootstrap resamples of the held-out pictures behind each interval.")
    probe_l2: float = option(1e-2, "L2 penalty of the linear probe on standardised features.")
    pool: Literal["mean", "cls"] = option("mean", "Picture feature: mean of the patch tokens, or the CLS token.")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    title: str = option("", "What this run is, for reports and model cards.")
    student: StudentConfig = section(StudentConfig, "The encoder that learns.")
    method: MoveKDConfig | HawaiiConfig | ToVEConfig | MergeConfig = section(
        MoveKDConfig, "The method, chosen by its `name`."
    )
    data: DataConfig = section(DataConfig, "Pictures.")
    text: TextConfig = section(TextConfig, "Conversations.")
    language: LanguageConfig = section(LanguageConfig, "Language model.")
    features: FeaturesConfig = section(FeaturesConfig, "Experts and their features.")
    optim: OptimConfig = section(OptimConfig, "Optimiser.")
    train: TrainConfig = section(TrainConfig, "Loop.")
    mesh: MeshConfig = section(MeshConfig, "Devices.")
    eval: EvalConfig = section(EvalConfig, "Evaluation.")

    def __post_init__(self) -> None:
        """Settles ``student.adapter.teacher_experts`` = 0, so that the student's settings alone tell its shape."""
        adapter = self.student.adapter
        if adapter.kind == "mola" and adapter.teacher_experts == 0:
            settled = dataclasses.replace(adapter, teacher_experts=len(self.features.experts))
            object.__setattr__(self, "student", dataclasses.replace(self.student, adapter=settled))
